"""Images with labels or texts in the rows of Parquet files, as Hugging Face data sets have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types
from pyarrow.compute import struct_field

from facm_core.autoencoders import ImageShape
from facm_core.errors import require
from facm_platform import storage
from facm_platform.latents.images.base import Piece, Sample, broken, check_label, text_of
from facm_platform.latents.images.files import (
    FETCH_BYTES,
    OpenedFiles,
    SourceFiles,
    found_files,
)
from facm_platform.latents.images.pixels import decode

# Rows decoded at once: few, for a row group may be of any size.
_BATCH_ROWS = 16

_BYTES = "bytes"


@dataclass(frozen=True)
class ParquetImages:
    """Rows of Parquet files.

    Attributes:
        files: The files.
        size: Pixels of the square crop.
        num_classes: Labels are in [0, num_classes); 0: they are not read.
        image_column: Column of encoded images: binary, or a struct with a field ``bytes``.
        label_column: Column of integers.
        text_column: Column of strings; "": texts are not read.
        class_names: Unknown.
    """

    files: SourceFiles
    size: int
    num_classes: int
    image_column: str
    label_column: str
    text_column: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Address, size, columns and how many classes."""
        text_column = f", text_column={self.text_column!r}" if self.text_column else ""
        return (
            f"parquet(uri={self.files.uri!r}, size={self.size}, num_classes={self.num_classes}, "
            f"image_column={self.image_column!r}, label_column={self.label_column!r}{text_column})"
        )

    @property
    def image_shape(self) -> ImageShape:
        """RGB squares."""
        return (3, self.size, self.size)

    def pieces(self, part_rows: int, seed: int) -> Iterator[Piece]:
        """Runs of whole row groups of one file, in stored order, whatever the seed.

        Raises:
            InvalidInputError: a file that is damaged or lacks a column; it is named.
        """
        opened = self.files.opened()
        for name in self.files.names():
            with self._open(opened, name) as file:
                yield from _runs(name, _group_rows(file), part_rows)

    def samples(self, piece: Piece) -> Iterator[Sample]:
        """Keys are ``<file>#<row of the file>``. A row without image or label is a broken image.

        Raises:
            InvalidInputError: a file that is missing, damaged or not the one that made the piece,
                or a label outside [0, num_classes); it is named.
        """
        name, row = piece["file"], piece["first_row"]
        with self._open(self.files.opened(), name) as file:
            if _run(name, _group_rows(file), *piece["row_groups"]) != piece:
                raise self._refused(name, "not the file that it was when the encoding began")
            for values in self._rows(file, piece["row_groups"]):
                yield self._sample(f"{name}#{row}", *values)
                row += 1

    def check(self, name: str) -> None:
        """Look whether the file `name` can be used. Raises InvalidInputError when not."""
        with self._open(self.files.opened(), name):
            pass

    def _rows(self, file: pq.ParquetFile, groups: list[int]) -> Iterator[tuple[Any, ...]]:
        """Image, label and text of each row; None for what is missing or not read."""
        is_struct = types.is_struct(file.schema_arrow.field(self.image_column).type)
        image = f"{self.image_column}.{_BYTES}" if is_struct else self.image_column
        others = [self.label_column if self.num_classes else "", self.text_column]
        batches = file.iter_batches(
            _BATCH_ROWS,
            range(*groups),
            columns=[image, *filter(None, others)],
            use_threads=False,
        )
        for batch in batches:
            images = batch.column(self.image_column)
            if is_struct:
                images = struct_field(images, _BYTES)
            nothing = [None] * len(batch)
            beside = (batch.column(name).to_pylist() if name else nothing for name in others)
            for content, *values in zip(images, *beside, strict=True):
                yield content.as_py(), *values

    def _sample(
        self, key: str, content: bytes | None, label: int | None, text: str | None
    ) -> Sample:
        if self.num_classes:
            if label is None:
                return broken(key, "no label")
            check_label(label, self.num_classes, key, self.files.field)
        label = -1 if label is None else label
        if content is None:
            return broken(key, "no image", label)
        load_text = partial(text_of, text) if self.text_column else None
        return Sample(key, label, partial(decode, content, self.size), load_text)

    @contextmanager
    def _open(self, opened: OpenedFiles, name: str) -> Iterator[pq.ParquetFile]:
        try:
            with (
                storage.explained(self.files.address(name), f"{self.files.field}.uri"),
                pq.ParquetFile(
                    opened.path(name),
                    filesystem=opened.store,
                    # Else whole row groups, of any size, are fetched before the first row.
                    pre_buffer=False,
                    buffer_size=FETCH_BYTES,
                    page_checksum_verification=True,
                ) as file,
            ):
                self._check_columns(file.schema_arrow, name)
                yield file
        except FileNotFoundError as error:
            raise self._refused(name, "missing") from error
        except (OSError, pa.ArrowException) as error:
            if _is_of_store(error):
                raise
            raise self._refused(name, f"damaged ({str(error).splitlines()[0]})") from error

    def _check_columns(self, schema: pa.Schema, name: str) -> None:
        wanted: dict[str, Callable[[pa.DataType], bool]] = {"image_column": _is_image}
        if self.num_classes:
            wanted["label_column"] = types.is_integer
        if self.text_column:
            wanted["text_column"] = _is_text
        for option, is_right in wanted.items():
            column = getattr(self, option)
            require(
                column in schema.names,
                f"{self.files.field}.{option}",
                column,
                f"{self.files.address(name)} has no such column",
                f"Give one of {', '.join(schema.names)}",
            )
            found = schema.field(column).type
            require(
                is_right(found),
                f"{self.files.field}.{option}",
                column,
                f"in {self.files.address(name)} its type is {found}",
                "Images are binary or a struct with a field bytes, labels integers, texts strings",
            )

    def _refused(self, name: str, problem: str) -> Exception:
        return self.files.refused(name, problem, "Restore this file, or take it away")


def parquet_images(
    uri: str,
    size: int,
    num_classes: int,
    image_column: str,
    label_column: str,
    text_column: str,
    field: str,
) -> ParquetImages:
    """The rows of ``*.parquet`` at `uri`.

    Raises:
        InvalidInputError: nothing there, or the first file is damaged or lacks a column.
    """
    files = found_files(uri, (".parquet",), field)
    source = ParquetImages(files, size, num_classes, image_column, label_column, text_column)
    source.check(next(files.names()))
    return source


def _group_rows(file: pq.ParquetFile) -> list[int]:
    metadata = file.metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _runs(name: str, group_rows: list[int], part_rows: int) -> Iterator[Piece]:
    start = rows = 0
    for group, more in enumerate(group_rows):
        if start < group and rows + more > part_rows:
            yield _run(name, group_rows, start, group)
            start, rows = group, 0
        rows += more
    if rows:
        yield _run(name, group_rows, start, len(group_rows))


def _run(name: str, group_rows: list[int], start: int, stop: int) -> Piece:
    """The row groups [start, stop), with enough about them to see that the file is another one."""
    return {
        "file": name,
        "row_groups": [start, stop],
        "first_row": sum(group_rows[:start]),
        "rows": sum(group_rows[start:stop]),
    }


def _is_of_store(error: Exception) -> bool:
    """Whether the store or the disk failed, which may do better at the next try, not the file."""
    return isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error))


def _is_image(type: pa.DataType) -> bool:
    if types.is_struct(type):
        field = type.get_field_index(_BYTES)
        return field >= 0 and _is_image(type.field(field).type)
    return bool(types.is_binary(type) or types.is_large_binary(type))


def _is_text(type: pa.DataType) -> bool:
    return bool(types.is_string(type) or types.is_large_string(type))
