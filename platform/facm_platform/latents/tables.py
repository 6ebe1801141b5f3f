"""The Arrow form of latent rows: schema, conversion without copies, cutting to a batch size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

LATENT, LABEL, KEY = COLUMNS = ("latent", "label", "key")
DTYPES = ("float32", "float16")

LatentShape = tuple[int, int, int]
"""Channels, height, width."""


def schema(shape: LatentShape, dtype: str) -> pa.Schema:
    """The columns of a latent set."""
    return pa.schema(
        [
            pa.field(LATENT, latent_type(shape, dtype), nullable=False),
            pa.field(LABEL, pa.int64(), nullable=False),
            pa.field(KEY, pa.string(), nullable=False),
        ]
    )


def latent_type(shape: LatentShape, dtype: str) -> pa.DataType:
    """Arrow's fixed-shape tensor of one latent."""
    return pa.fixed_shape_tensor(pa.from_numpy_dtype(np.dtype(dtype)), shape)


def row_bytes(shape: LatentShape, dtype: str) -> int:
    """Bytes of one row in memory, keys estimated."""
    return math.prod(shape) * np.dtype(dtype).itemsize + 8 + 24


def to_table(
    latents: NDArray[np.generic], labels: NDArray[np.int64], keys: Sequence[str] | pa.Array
) -> pa.Table:
    """Rows from latents (B, C, H, W), labels (B,) and B keys; the arrays are not copied."""
    shape = latents.shape[1:]
    values = pa.array(np.ascontiguousarray(latents).reshape(-1))
    storage = pa.FixedSizeListArray.from_arrays(values, math.prod(shape))
    columns = schema(shape, latents.dtype.name)
    tensor = pa.ExtensionArray.from_storage(columns.field(LATENT).type, storage)
    return pa.table([tensor, pa.array(labels), pa.array(keys, pa.string())], schema=columns)


def latents_of(table: pa.Table) -> NDArray[Any]:
    """Latents (B, C, H, W) of rows: a read-only view when they lie in one piece."""
    column = table.column(LATENT)
    chunks = [chunk.storage.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    values = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return values.reshape(len(table), *column.type.shape)


def labels_of(table: pa.Table) -> NDArray[np.int64]:
    """Labels (B,) of rows."""
    labels: NDArray[np.int64] = table.column(LABEL).to_numpy()
    return labels


def rebatch(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in the same order, `rows` at a time; the last table may be shorter."""
    pending: list[pa.Table] = []
    pending_rows = 0
    for table in tables:
        start = 0
        while pending_rows + len(table) - start >= rows:
            stop = start + rows - pending_rows
            pending.append(table.slice(start, stop - start))
            yield pa.concat_tables(pending)
            pending, pending_rows, start = [], 0, stop
        if start < len(table):
            pending.append(table.slice(start))
            pending_rows += len(table) - start
    if pending:
        yield pa.concat_tables(pending)
