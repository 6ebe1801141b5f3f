"""The Arrow form of latent rows: which columns, conversion without copies, cutting and packing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from facm_core.errors import require, require_one_of

LATENT, LATENT_FLIP, KEY = "latent", "latent_flip", "key"
LABEL, TEXT_EMBEDDING, TEXT_MASK = "label", "text_embedding", "text_mask"
DTYPES = ("float32", "float16")

LatentShape = tuple[int, int, int]
"""Channels, height, width."""

Values = Mapping[str, Any]
"""A column by its name: an array whose first dimension is the row, or the list of keys."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """The columns of a latent set.

    Attributes:
        latent_shape: (C, H, W) of one latent, as a network sees it.
        latent_dtype: ``float32`` or ``float16``, as stored.
        moments: Stored are the mean and the log-variance of the latent, 2C channels; readers draw
            the latent from them.
        flip: ``latent_flip`` holds the latent of the mirrored image; readers toss a coin.
        num_classes: Labels are in [0, num_classes); 0 where rows are conditioned on text.
        text_shape: (tokens, features) of an embedded text; empty where rows have labels.
        text_dtype: ``float32`` or ``float16``, as stored.
    """

    latent_shape: LatentShape
    latent_dtype: str
    moments: bool = False
    flip: bool = False
    num_classes: int = 0
    text_shape: tuple[int, ...] = ()
    text_dtype: str = "float16"

    def __post_init__(self) -> None:
        remedy = "Mend the manifest, or make the set again"
        for holds, name, problem in (
            (len(self.latent_shape) == 3, "latent_shape", "not of the form (C, H, W)"),
            (len(self.text_shape) in (0, 2), "text_shape", "not of the form (tokens, features)"),
            (self.num_classes >= 0, "num_classes", "negative"),
            (
                (self.num_classes > 0) != (len(self.text_shape) > 0),
                "num_classes",
                "rows have either labels or a text, one of num_classes and text_shape",
            ),
        ):
            require(holds, name, getattr(self, name), problem, remedy)
        require_one_of("latent_dtype", self.latent_dtype, DTYPES)
        require_one_of("text_dtype", self.text_dtype, DTYPES)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of a row, of every column of tensors."""
        channels, height, width = self.latent_shape
        stored = (channels * (2 if self.moments else 1), height, width)
        columns: dict[str, tuple[str, tuple[int, ...]]] = {LATENT: (self.latent_dtype, stored)}
        if self.flip:
            columns[LATENT_FLIP] = columns[LATENT]
        if self.text_shape:
            columns[TEXT_EMBEDDING] = (self.text_dtype, self.text_shape)
            columns[TEXT_MASK] = ("uint8", self.text_shape[:1])
        return columns

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow's types of all columns."""
        fields = [(name, _tensor_type(*tensor)) for name, tensor in self.tensors.items()]
        if self.num_classes:
            fields.append((LABEL, pa.int64()))
        fields.append((KEY, pa.string()))
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])

    @property
    def latent_columns(self) -> tuple[str, ...]:
        """Columns of latents."""
        return (LATENT, LATENT_FLIP) if self.flip else (LATENT,)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row in memory, keys estimated."""
        tensors = (
            math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in self.tensors.values()
        )
        return sum(tensors) + 8 + 24

    def drawn(self) -> RowFormat:
        """The columns of rows whose latents are drawn: neither moments nor a mirrored twin."""
        return RowFormat(
            latent_shape=self.latent_shape,
            latent_dtype="float32" if self.moments else self.latent_dtype,
            num_classes=self.num_classes,
            text_shape=self.text_shape,
            text_dtype=self.text_dtype,
        )

    def table(self, values: Values) -> pa.Table:
        """Rows of these columns; arrays of the right dtype are not copied."""
        columns = []
        for field in self.schema:
            value = values[field.name]
            if field.name in self.tensors:
                dtype, shape = self.tensors[field.name]
                flat = np.ascontiguousarray(value, dtype).reshape(-1)
                rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), math.prod(shape))
                columns.append(pa.ExtensionArray.from_storage(field.type, rows))
            else:
                columns.append(pa.array(value, field.type))
        return pa.table(columns, schema=self.schema)


def values_of(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of tensors (B, …) or of labels (B,): a read-only view when it lies in one piece."""
    column = table.column(name)
    if not isinstance(column.type, pa.FixedShapeTensorType):
        labels: NDArray[np.int64] = column.to_numpy()
        return labels
    chunks = [chunk.storage.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values.reshape(len(table), *column.type.shape)


def rebatch(tables: Iterable[pa.Table], rows: Iterable[int]) -> Iterator[pa.Table]:
    """The same rows in the same order, so many at a time (an endless iterable); the last
    table may be shorter."""
    sizes = iter(rows)
    size = next(sizes)
    pending: list[pa.Table] = []
    pending_rows = 0
    for table in tables:
        start = 0
        while pending_rows + len(table) - start >= size:
            stop = start + size - pending_rows
            pending.append(table.slice(start, stop - start))
            yield pa.concat_tables(pending)
            pending, pending_rows, start = [], 0, stop
            size = next(sizes)
        if start < len(table):
            pending.append(table.slice(start))
            pending_rows += len(table) - start
    if pending:
        yield pa.concat_tables(pending)


def packed(table: pa.Table) -> pa.Table:
    """All rows of `table` as the one row of another: what is dealt out whole. Nothing is copied."""
    columns = {}
    for name, column in zip(table.column_names, table.combine_chunks().columns, strict=True):
        values = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        values = values.storage if isinstance(values, pa.ExtensionArray) else values
        columns[name] = pa.LargeListArray.from_arrays(pa.array([0, len(values)]), values)
    return pa.table(columns)


def unpacked(row: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table, of the given columns, that `packed` made `row` of."""
    columns = []
    for field in schema:
        values = row.column(field.name).chunk(0).flatten()
        if isinstance(field.type, pa.BaseExtensionType):
            values = pa.ExtensionArray.from_storage(field.type, values)
        columns.append(values)
    return pa.table(columns, schema=schema)


def _tensor_type(dtype: str, shape: tuple[int, ...]) -> pa.DataType:
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(dtype)), shape)
