"""Real images, in pieces that several processes can look at side by side."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Iterator
from itertools import repeat
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from facm_core.autoencoders import ImageShape
from facm_core.models.base import Condition, entry
from facm_core.pixels import quantise
from facm_platform import storage
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.autoencoder import autoencoder_of
from facm_platform.latents.batches import batches_of
from facm_platform.latents.images import BrokenImageError, ImageSource, Sample
from facm_platform.latents.stream import read

_PIECE_IMAGES = 4096
_IMAGES = "arr_0.npy"


LATENTS = "latents"


class RealImages(Protocol):
    """A set of images. Small when pickled.

    Attributes:
        kind: ``latents``, ``images`` or ``npz``.
        labelled: Whether they have labels.
    """

    kind: str
    labelled: bool

    @property
    def id(self) -> str:
        """What they are."""

    def pieces(self) -> Iterator[Any]:
        """All there is, each image in one of them; always the same ones."""

    def batches(self, piece: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Its images: uint8 (N, C, H, W), with labels (N,), at most `size` of them at once.

        Where there are no labels they are the numbers of the rows, or 0.
        """


class DecodedSet:
    """Every row of a latent set, decoded and quantised as samples are.

    The order is that of one epoch with seed 0: fixed by the set alone.
    """

    kind = LATENTS

    def __init__(self, uri: str, manifest: LatentManifest) -> None:
        self._uri, self._manifest = uri, manifest
        self.labelled = manifest.num_classes > 0

    @property
    def id(self) -> str:
        """Hash of its manifest."""
        return self._manifest.sha256

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Stretches of rows."""
        rows = self._manifest.rows
        for start in range(0, rows, _PIECE_IMAGES):
            yield start, min(start + _PIECE_IMAGES, rows)

    def batches(self, piece: tuple[int, int], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Decoded here."""
        autoencoder, row = autoencoder_of(self._manifest), piece[0]
        for batch in local_batches(self._stream, *piece, size):
            images = autoencoder.decode(self._manifest.denormalise(batch.latents))
            rows = torch.arange(row, row := row + len(batch))
            yield quantise(images), entry(batch.condition, "label") if self.labelled else rows

    def conditions(self, start: int, stop: int, size: int) -> Iterator[Condition]:
        """Those of the rows [start, stop), `size` at once; after the last row comes the first."""
        rows, stream = self._manifest.rows, self._stream
        tables = (
            table
            for first in range(start - start % rows, stop, rows)
            for task in stream.tasks(max(start - first, 0), min(stop - first, rows))
            for table in read(task)
        )
        return (batch.condition for batch in batches_of(self._manifest, tables, repeat(size)))

    @property
    def _stream(self) -> LatentStream:
        return LatentStream(self._uri, self._manifest, seed=0)


class SourceImages:
    """Images as jobs/encode.py reads them, cut to a square; broken ones are left out."""

    kind = "images"
    labelled = True

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    @property
    def id(self) -> str:
        """Kind, address, options."""
        return self._source.id

    def pieces(self) -> Iterator[Any]:
        """Of the source."""
        return self._source.pieces(_PIECE_IMAGES, seed=0)

    def batches(self, piece: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read here."""
        loaded = filter(None, map(_loaded, self._source.samples(piece)))
        while batch := list(itertools.islice(loaded, size)):
            yield torch.stack([image for image, _ in batch]), torch.tensor([k for _, k in batch])


class NpzImages:
    """The first images of an ``.npz`` that has them, as ADM's do: ``arr_0``, uint8 (N, H, W, C).

    Args:
        uri: Of the file.
        count: At most so many.
    """

    kind = "npz"
    labelled = False

    def __init__(self, uri: str, count: int) -> None:
        self._uri, self._count = uri, count

    @property
    def id(self) -> str:
        """Its address."""
        return self._uri

    def pieces(self) -> Iterator[int]:
        """One, or none where there are no images."""
        with storage.node_copy(self._uri) as path, zipfile.ZipFile(path) as file:
            if _IMAGES in file.namelist():
                yield self._count

    def batches(self, piece: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read one after the other: the whole would be gigabytes. All labels are 0."""
        with (
            storage.node_copy(self._uri) as path,
            zipfile.ZipFile(path) as file,
            file.open(_IMAGES) as stream,
        ):
            np.lib.format.read_magic(stream)
            (count, *shape), _, dtype = np.lib.format.read_array_header_1_0(stream)
            assert dtype == np.uint8
            for start in range(0, min(count, piece), size):
                rows = min(size, count - start, piece - start)
                content = stream.read(rows * math.prod(shape))
                images = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                images = images.view(rows, *shape).permute(0, 3, 1, 2).contiguous()
                yield images, torch.zeros(rows, dtype=torch.int64)


def image_shape(manifest: LatentManifest) -> ImageShape:
    """Shape of the decoded images of a set."""
    latent = torch.zeros(1, *manifest.latent_shape)
    channels, height, width = autoencoder_of(manifest).decode(latent).shape[1:]
    return (channels, height, width)


def _loaded(sample: Sample) -> tuple[Tensor, int] | None:
    try:
        return quantise(torch.from_numpy(sample.load())), sample.label
    except BrokenImageError:
        return None
