"""A picture of the first rows of a latent set, decoded: does it hold what it should?"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from facm_core.errors import require
from facm_core.pixels import quantise
from facm_platform import storage
from facm_platform.config.job import JobResult
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.stream import LatentStream

MAX_ROWS = 1024

_BACKGROUND, _INK = (255, 255, 255), (28, 32, 40)
_TILE_PIXELS = 64  # a smaller image is enlarged by the whole factor that comes nearest to this
_GAP, _CAPTION, _FONT = 4, 16, 12
_BATCH_ROWS = 16


def sample(uri: str, rows: int = 64, seed: int = 0, output: str = "latents.png") -> JobResult:
    """Draw the first rows of the order of `seed`, decoded, with their labels below, as a PNG.

    Args:
        uri: Of the set.
        rows: How many; all, where the set has fewer.
        seed: Of the order, and of what is drawn of moments and mirrored latents.
        output: File or ``s3://`` address to write.

    Raises:
        InvalidInputError: no such set, its autoencoder is not there or gives images of neither one
            nor three channels, or an output that cannot be written.
    """
    # On first use: PyTorch takes seconds, and what else inspects a set needs none of it.
    import torch

    from facm_platform.latents.autoencoder import autoencoder_of
    from facm_platform.latents.batches import local_batches

    require(1 <= rows <= MAX_ROWS, "rows", rows, "no sheet", f"Give 1 ... {MAX_ROWS}")
    require(output.endswith(".png"), "output", output, "not the name of a PNG", "Give FILE.png")
    uri, output = storage.absolute(uri), storage.absolute(output, "output")
    manifest = LatentManifest.load(uri, "uri")
    stream = LatentStream(uri, manifest, seed)
    storage.check_reachable(output, "output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = autoencoder_of(manifest, "uri").to(device, torch.float32)

    images: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for batch in local_batches(stream, 0, min(rows, manifest.rows), _BATCH_ROWS):
        decoded = autoencoder.decode(manifest.denormalise(batch.latents).to(device))
        channels = decoded.shape[1]
        problem = f"its images have {channels} channels"
        remedy = "Only sets of 1 or 3 channels can be shown"
        require(channels in (1, 3), "uri", uri, problem, remedy)
        pixels = quantise(decoded)
        images += list(pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy())
        labels = batch.condition.tolist() if isinstance(batch.condition, torch.Tensor) else []
        captions += [manifest.class_names[n] if manifest.class_names else str(n) for n in labels]

    content = io.BytesIO()
    draw(images, captions).save(content, "PNG")
    storage.write_bytes(output, content.getvalue())
    print(f"{len(images)} images of {uri} in {output}", flush=True)
    return JobResult(
        run_id=None,
        run_name="latents sample",
        artifact_uri=output,
        metrics={"rows": float(len(images))},
    )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the images of a sheet lie: row by row, in nearly as many columns as rows.

    Attributes:
        count: How many images.
        height: Of an image, in its own pixels.
        width: Of an image, in its own pixels.
        caption: Pixels of the sheet below each image.
    """

    count: int
    height: int
    width: int
    caption: int

    @cached_property
    def scale(self) -> int:
        """Pixels of the sheet along the side of a pixel of an image."""
        return max(1, round(_TILE_PIXELS / max(self.height, self.width)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet, in its pixels."""
        rows = math.ceil(self.count / self._columns)
        return _GAP + self._columns * self._step[0], _GAP + rows * self._step[1]

    def corner(self, index: int) -> tuple[int, int]:
        """Left and top of image number `index`, in pixels of the sheet."""
        row, column = divmod(index, self._columns)
        return _GAP + column * self._step[0], _GAP + row * self._step[1]

    @cached_property
    def _columns(self) -> int:
        return math.ceil(math.sqrt(self.count))

    @cached_property
    def _step(self) -> tuple[int, int]:
        return self.width * self.scale + _GAP, self.height * self.scale + self.caption + _GAP


def draw(images: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> Image.Image:
    """The sheet of images (H, W, 3), each with its caption below; `captions` may be empty."""
    height, width, _ = images[0].shape
    grid = Grid(count=len(images), height=height, width=width, caption=_CAPTION if captions else 0)
    sheet = Image.new("RGB", grid.size, _BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    tile = (width * grid.scale, height * grid.scale)
    for index, image in enumerate(images):
        enlarged = Image.fromarray(image).resize(tile, Image.Resampling.NEAREST)
        sheet.paste(enlarged, grid.corner(index))
    for index, caption in enumerate(captions):
        left, top = grid.corner(index)
        while font.getlength(caption) > tile[0]:
            caption = caption[:-1]
        pen.text((left + tile[0] // 2, top + tile[1] + 1), caption, _INK, font, anchor="ma")
    return sheet
