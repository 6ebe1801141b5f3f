"""Pictures to be read back, and the places they are read from."""

from __future__ import annotations

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from facm_platform.latents.images import (
    BrokenImageError,
    ImagesConfig,
    ImageSource,
    Sample,
    image_source,
)

SIZE = 8


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on a slope: no two pixels, rows or columns are the same."""
    noise = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
    slope = np.linspace(0, 155, width * height).reshape(height, width, 1)
    return Image.fromarray((noise + slope).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def coloured(index: int) -> bytes:
    """A PNG of one colour, that of `index`."""
    return encoded(Image.new("RGB", (SIZE, SIZE), (index // 256, index % 256, 255)), "PNG")


def index_of(pixels: NDArray[np.float32]) -> int:
    """The index that the image was `coloured` by."""
    assert (pixels.shape, pixels.dtype) == ((3, SIZE, SIZE), np.float32)
    high, low, blue = np.rint((pixels[:, 0, 0] + 1) * 127.5).astype(int)
    assert blue == 255
    return int(high * 256 + low)


def gathered(source: ImageSource, part_rows: int, seed: int = 0) -> list[list[Sample]]:
    """The samples of every piece, each read by a copy of the source from a copy of the piece."""
    worker = pickle.dumps(source)
    assert len(worker) < 10_000
    pieces = list(source.pieces(part_rows, seed))
    assert pieces == list(source.pieces(part_rows, seed))
    return [list(pickle.loads(worker).samples(json.loads(json.dumps(p)))) for p in pieces]


def contents(samples: list[Sample]) -> dict[str, tuple[int, int | str]]:
    """By key: the label, and the index of the image or why it is broken. Loads in threads."""

    def look(sample: Sample) -> tuple[int, int | str]:
        try:
            return sample.label, index_of(sample.load())
        except BrokenImageError as error:
            return sample.label, str(error)

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip((s.key for s in samples), pool.map(look, samples), strict=True))
    assert len(found) == len(samples)
    return found


class Place:
    """A folder on either kind of store, to be filled."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def put(self, name: str, content: bytes) -> None:
        if self.uri.startswith("s3://"):
            bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
            return
        path = Path(self.uri, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def source(
        self, kind: str, name: str = "", *, texts: bool = False, **options: Any
    ) -> ImageSource:
        """With labels, or with texts."""
        uri = f"{self.uri}/{name}" if name else self.uri
        config = ImagesConfig(kind=kind, uri=uri, size=SIZE, **options)
        return image_source(config, "data", labels=not texts, texts=texts)
