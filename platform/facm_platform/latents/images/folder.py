"""One file for each image, in a folder for each class: the layout of ImageNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray

from facm_core.autoencoders import ImageShape
from facm_core.errors import InvalidInputError, require
from facm_platform.latents.images.base import BrokenImageError, Piece, Sample, text_of
from facm_platform.latents.images.files import OpenedFiles, SourceFiles, found_files, is_hidden
from facm_platform.latents.images.pixels import IMAGE_SUFFIXES, decode
from facm_platform.latents.stream import permutation
from facm_platform.storage.listing import iter_names

# Names in memory at once, in parts: so many parts are mixed with each other.
_BLOCK_PARTS = 64

_BESIDE = "Move all images into folders, one for each class, or all out of them"


@dataclass(frozen=True)
class FolderImages:
    """Images below the folders of their classes, or all of one class directly in one folder.

    Attributes:
        files: The images.
        size: Pixels of the square crop.
        class_names: The folders, sorted; () where there are none.
        texts: Whether the text of an image is read: its file, with the suffix ``.txt``.
    """

    files: SourceFiles
    size: int
    class_names: tuple[str, ...]
    texts: bool = False

    @property
    def id(self) -> str:
        """Address and size."""
        return f"folder(uri={self.files.uri!r}, size={self.size})"

    @property
    def num_classes(self) -> int:
        """As many as folders, or 1."""
        return len(self.class_names) or 1

    @property
    def image_shape(self) -> ImageShape:
        """RGB squares."""
        return (3, self.size, self.size)

    def pieces(self, part_rows: int, seed: int) -> Iterator[Piece]:
        """Names with labels, mixed over 64 parts, because a listing is sorted by class.

        Raises:
            InvalidInputError: an image beside the class folders, or below one that is new.
        """
        labels = {name: label for label, name in enumerate(self.class_names)}
        names = self.files.names()
        for block in count():
            found = list(islice(names, _BLOCK_PARTS * part_rows))
            if not found:
                return
            order = permutation(len(found), (seed, block))
            for start in range(0, len(found), part_rows):
                chosen = (found[index] for index in order[start : start + part_rows])
                yield {"files": [[name, self._label(name, labels)] for name in chosen]}

    def samples(self, piece: Piece) -> Iterator[Sample]:
        """Keys are names relative to the folder. A file that is gone by now is a broken image."""
        opened = self.files.opened()
        for name, label in piece["files"]:
            text = partial(_load_text, opened, name) if self.texts else None
            yield Sample(name, label, partial(_load, opened, name, self.size), text)

    def _label(self, name: str, labels: dict[str, int]) -> int:
        folder, slash, _ = name.partition("/")
        if not self.class_names and not slash:
            return 0
        if slash and folder in labels:
            return labels[folder]
        raise self.files.refused(name, f"not in one of {len(labels)} class folders", _BESIDE)


def folder_images(uri: str, size: int, texts: bool, field: str) -> FolderImages:
    """The images below `uri`, in crops of `size` pixels; with or without the `texts` beside them.

    Raises:
        InvalidInputError: no folder, no image in it, or images beside the class folders.
    """
    files = found_files(uri, IMAGE_SUFFIXES, field)
    uri_field = f"{field}.uri"
    require(not files.is_file, uri_field, uri, "a file", "Give the folder that it lies in")
    classes, beside = [], ""
    for name in iter_names(files.uri, uri_field):
        if is_hidden(name):
            continue
        if name.endswith("/"):
            classes.append(name[:-1])
        elif name.lower().endswith(IMAGE_SUFFIXES):
            beside = name
    if classes and beside:
        raise InvalidInputError(
            uri_field, uri, f"images ({beside}) beside class folders ({min(classes)})", _BESIDE
        )
    return FolderImages(files, size, tuple(sorted(classes)), texts)


def _load(opened: OpenedFiles, name: str, size: int) -> NDArray[np.float32]:
    try:
        content = opened.read(name)
    except FileNotFoundError as error:
        raise BrokenImageError("missing") from error
    return decode(content, size)


def _load_text(opened: OpenedFiles, name: str) -> str:
    try:
        return text_of(opened.read(f"{name.rpartition('.')[0]}.txt"))
    except FileNotFoundError:
        return text_of(None)
