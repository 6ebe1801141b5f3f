"""Named sources of labelled images, produced in stretches so that no source need fit in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from facm_core.autoencoders import ImageShape
from facm_core.errors import InvalidInputError


@dataclass(frozen=True)
class ImageBatch:
    """Images (B, C, H, W) float32 in [-1, 1], labels (B,) int64, and B keys."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    keys: list[str]


class ImageSource(Protocol):
    """Labelled images in a fixed order.

    Attributes:
        id: The name `image_source` knows it by.
        num_classes: Labels are in [0, num_classes).
        image_shape: (C, H, W) of every image.
    """

    id: str
    num_classes: int
    image_shape: ImageShape

    @property
    def rows(self) -> int:
        """How many images there are."""

    @property
    def sha256(self) -> str:
        """Hash that changes whenever an image, a label or the order does."""

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[ImageBatch]:
        """Images number [start, stop), at most `batch_size` at a time."""


class Digits:
    """scikit-learn's 1,797 handwritten digits: 8 x 8 pixels, 10 classes, values 0 to 16."""

    id = "digits"
    num_classes = 10
    image_shape = (1, 8, 8)

    @property
    def rows(self) -> int:
        """1,797."""
        return len(self._arrays[1])

    @cached_property
    def sha256(self) -> str:
        """Hash of all images and labels."""
        images, labels = self._arrays
        return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[ImageBatch]:
        """Digits number [start, stop) with keys ``digits/00000`` and so on."""
        images, labels = self._arrays
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            keys = [f"{self.id}/{index:05d}" for index in range(first, last)]
            yield ImageBatch(images[first:last], labels[first:last], keys)

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        # Imported here: a second and a half that no other source needs.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        scaled = images.reshape(-1, *self.image_shape) / 8.0 - 1.0
        return scaled.astype(np.float32), labels.astype(np.int64)


_SOURCES: dict[str, Callable[[], ImageSource]] = {Digits.id: Digits}


def image_source(id: str, field: str = "source") -> ImageSource:
    """The source of that name.

    Raises:
        InvalidInputError: no source has that name; `field` is the one at fault.
    """
    if id not in _SOURCES:
        known = ", ".join(sorted(_SOURCES))
        raise InvalidInputError(field, id, "there is no such image source", f"Use one of {known}")
    return _SOURCES[id]()
