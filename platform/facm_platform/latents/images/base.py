"""What a source of images is, whatever its images are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from facm_core.autoencoders import ImageShape
from facm_core.errors import require

Piece = dict[str, Any]
"""Which inputs make one part of a latent set: JSON, to be read back by another process."""


class BrokenImageError(Exception):
    """An image that cannot be used. The message is the reason: one line, and no path."""


@dataclass(frozen=True)
class Sample:
    """One image of a source, not read yet.

    Attributes:
        key: Its source id, unique in the source.
        label: In [0, num_classes); -1 for a broken image without one, and where none is read.
        load: Reads and decodes it: float32 (C, H, W) in [-1, 1]. Raises `BrokenImageError`.
        load_text: Reads the text beside it, which is not blank. Raises `BrokenImageError`. None
            where the source does not read texts.
    """

    key: str
    label: int
    load: Callable[[], NDArray[np.float32]]
    load_text: Callable[[], str] | None = None


class ImageSource(Protocol):
    """Images with labels or texts, each in exactly one piece. Small when pickled."""

    @property
    def id(self) -> str:
        """All that determines its contents: kind, address, options."""

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes); 0: they are not read."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label; () where unknown."""

    @property
    def image_shape(self) -> ImageShape:
        """(C, H, W) of every image, after cropping."""

    def pieces(self, part_rows: int, seed: int) -> Iterator[Piece]:
        """All there is, in pieces of about `part_rows` images; equal arguments, equal pieces.

        Found one after the other: what is in memory does not depend on the size of the source.

        Args:
            part_rows: Positive.
            seed: Not negative; what order there is to choose depends on it.

        Raises:
            InvalidInputError: a damaged file, or one in a place where none belongs; it is named.
        """

    def samples(self, piece: Piece) -> Iterator[Sample]:
        """The images of `piece`, of which only a few are in memory unless the caller keeps them.

        `Sample.load` may be called from several threads, also after the next sample was taken.

        Raises:
            InvalidInputError: a file with many images that is missing or damaged, or a label
                outside [0, num_classes); it is named.
        """


def check_label(label: int, num_classes: int, key: str, field: str) -> None:
    """Refuse a `label` that the source named `field` says there is not."""
    require(
        0 <= label < num_classes,
        f"{field}.num_classes",
        num_classes,
        f"the label of {key} is {label}",
        f"Labels are 0 to {field}.num_classes - 1: give another {field}.num_classes or mend it",
    )


def text_of(content: bytes | str | None) -> str:
    """The text beside an image, UTF-8. Raises `BrokenImageError` when it says nothing."""
    if content is None:
        raise BrokenImageError("no text")
    try:
        text = content if isinstance(content, str) else content.decode()
    except UnicodeDecodeError as error:
        raise BrokenImageError("the text is not UTF-8") from error
    if not text.strip():
        raise BrokenImageError("the text is blank")
    return text


def broken(key: str, reason: str, label: int = -1) -> Sample:
    """An image that is known to be broken before it is loaded."""

    def load() -> NoReturn:
        raise BrokenImageError(reason)

    return Sample(key, label, load)
