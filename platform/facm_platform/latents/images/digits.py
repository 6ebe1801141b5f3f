"""Handwritten digits that come with scikit-learn: a source that needs no files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from facm_core.autoencoders import ImageShape
from facm_platform.latents.images.base import Piece, Sample


@dataclass(frozen=True)
class DigitImages:
    """1,797 digits of 8 x 8 pixels, 10 classes, values 0 to 16, in their stored order."""

    num_classes: int = 10
    class_names: tuple[str, ...] = tuple("0123456789")
    image_shape: ImageShape = (1, 8, 8)

    @property
    def id(self) -> str:
        """With the hash of all images and labels, which another scikit-learn might change."""
        images, labels = _digits()
        return f"digits({hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()})"

    def pieces(self, part_rows: int, seed: int) -> Iterator[Piece]:
        """Stretches of the stored order, whatever the seed."""
        rows = len(_digits()[1])
        for start in range(0, rows, part_rows):
            yield {"start": start, "stop": min(start + part_rows, rows)}

    def samples(self, piece: Piece) -> Iterator[Sample]:
        """Digits number [start, stop) with keys ``digits/00000`` and so on."""
        images, labels = _digits()
        for index in range(piece["start"], piece["stop"]):
            yield Sample(f"digits/{index:05d}", int(labels[index]), images[index].copy)


@cache
def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    # Imported here: a second and a half that no other source needs.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = images.reshape(-1, 1, 8, 8) / 8.0 - 1.0
    return scaled.astype(np.float32), labels.astype(np.int64)
