"""Images with labels or texts in tar archives, as the webdataset library writes them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from facm_core.autoencoders import ImageShape
from facm_platform import storage
from facm_platform.latents.images.base import (
    BrokenImageError,
    Piece,
    Sample,
    broken,
    check_label,
    text_of,
)
from facm_platform.latents.images.files import SourceFiles, found_files
from facm_platform.latents.images.pixels import IMAGE_SUFFIXES, decode

_LABELS = (".cls", ".json")
_TEXT = ".txt"


@dataclass(frozen=True)
class WebDatasetImages:
    """Members of tar archives; those whose names agree up to the first dot are one image.

    Attributes:
        files: The archives.
        size: Pixels of the square crop.
        num_classes: Labels are in [0, num_classes); 0: they are not read.
        texts: Whether the text of an image is read, the ``.txt``.
        class_names: Unknown.
    """

    files: SourceFiles
    size: int
    num_classes: int
    texts: bool = False
    class_names: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Address, size and how many classes."""
        uri = self.files.uri
        return f"webdataset(uri={uri!r}, size={self.size}, num_classes={self.num_classes})"

    @property
    def image_shape(self) -> ImageShape:
        """RGB squares."""
        return (3, self.size, self.size)

    def pieces(self, part_rows: int, seed: int) -> Iterator[Piece]:
        """The archives in order of name, however many images are in each, whatever the seed."""
        for name in self.files.names():
            yield {"file": name}

    def samples(self, piece: Piece) -> Iterator[Sample]:
        """Keys are ``<archive>/<name up to the first dot>``.

        What has no image, or no integer as label where labels are read, is a broken image.

        Raises:
            InvalidInputError: an archive that is missing, truncated or damaged, or in which the
                members of an image do not follow each other, or a label outside
                [0, num_classes); it is named.
        """
        name = piece["file"]
        seen: set[str] = set()
        with self._archive(name) as archive:
            for group in _groups(archive):
                if group.base in seen:
                    problem = f"the members of {group.base} do not follow each other"
                    raise self._refused(name, problem, "Sort the archive by name")
                seen.add(group.base)
                yield self._sample(f"{name}/{group.base}", group)

    def _sample(self, key: str, group: _Group) -> Sample:
        label = -1
        if self.num_classes:
            try:
                label = group.label()
            except BrokenImageError as error:
                return broken(key, str(error))
            check_label(label, self.num_classes, key, self.files.field)
        if len(group.images) != 1:
            return broken(key, "several images" if group.images else "no image", label)
        load_text = partial(text_of, group.text) if self.texts else None
        return Sample(key, label, partial(decode, group.images[0], self.size), load_text)

    @contextmanager
    def _archive(self, name: str) -> Iterator[tarfile.TarFile]:
        try:
            with (
                storage.explained(self.files.address(name), f"{self.files.field}.uri"),
                self.files.opened().stream(name) as stream,
                tarfile.open(
                    fileobj=stream,
                    mode="r|",
                    tarinfo=_Member,
                    # Keys are UTF-8, whatever the names of the members are.
                    encoding="utf-8",
                    errors="backslashreplace",
                ) as archive,
            ):
                yield archive
        except FileNotFoundError as error:
            raise self._refused(name, "missing") from error
        except (tarfile.TarError, _DamageError) as error:
            problem = f"truncated or damaged ({error})"
            raise self._refused(name, problem) from error

    def _refused(
        self, name: str, problem: str, remedy: str = "Restore this file, or take it away"
    ) -> Exception:
        return self.files.refused(name, problem, remedy)


def webdataset_images(
    uri: str, size: int, num_classes: int, texts: bool, field: str
) -> WebDatasetImages:
    """The images in ``*.tar`` at `uri`.

    Raises:
        InvalidInputError: nothing there.
    """
    return WebDatasetImages(found_files(uri, (".tar",), field), size, num_classes, texts)


class _DamageError(Exception):
    """A header that is none; not a `tarfile.HeaderError`, which ends an archive without a word."""


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """As in the base class; but an archive ends with a block of zeros and in no other way."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise _DamageError(str(error)) from error


@dataclass
class _Group:
    """What an archive holds about one image."""

    base: str
    images: list[bytes] = field(default_factory=list)
    labels: dict[str, bytes] = field(default_factory=dict)
    text: bytes | None = None

    def label(self) -> int:
        """The integer in the ``.cls``, or of "label" or "cls" in the ``.json``."""
        if not self.labels:
            raise BrokenImageError("no label")
        if ".cls" in self.labels:
            return _integer(self.labels[".cls"])
        try:
            values = json.loads(self.labels[".json"])
        except ValueError as error:
            raise BrokenImageError("the .json is damaged") from error
        for name in ("label", "cls"):
            if isinstance(values, dict) and name in values:
                return _integer(values[name])
        raise BrokenImageError("no label in the .json")


def _integer(value: Any) -> int:
    # Neither 3.7 nor true is a class, though int() takes both.
    if isinstance(value, int | str | bytes) and not isinstance(value, bool):
        with suppress(ValueError):
            return int(value)
    raise BrokenImageError("the label is no integer")


def _groups(archive: tarfile.TarFile) -> Iterator[_Group]:
    """Neighbours with the same name up to the first dot; of members, only what is of use."""
    group = _Group("")
    while (member := archive.next()) is not None:
        # A stream never goes back to them, but TarFile keeps all it has seen.
        archive.members = []  # type: ignore[attr-defined]
        base, suffix = _split(member.name)
        if not base or not member.isfile():
            continue
        if base != group.base:
            if group.base:
                yield group
            group = _Group(base)
        if suffix in IMAGE_SUFFIXES:
            group.images.append(_content(archive, member))
        elif suffix in _LABELS:
            group.labels[suffix] = _content(archive, member)
        elif suffix == _TEXT:
            group.text = _content(archive, member)
    if group.base:
        yield group


def _split(name: str) -> tuple[str, str]:
    """Name up to the first dot after the last slash, and what follows; "" for hidden members."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    base, dot, suffix = file.partition(".")
    return (folder + slash + base if base and dot else ""), (dot + suffix).lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()
