"""Batches for training out of a `LatentStream`, whoever reads the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import pyarrow as pa
import torch

from facm_core.errors import require
from facm_core.models.base import Condition
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.stream import LatentStream, read
from facm_platform.latents.tables import (
    KEY,
    LABEL,
    LATENT,
    TEXT_EMBEDDING,
    TEXT_MASK,
    rebatch,
)


@dataclass(frozen=True)
class Batch:
    """Rows for one step.

    Attributes:
        latents: (B, C, H, W) float32, normalised by the manifest of the set.
        condition: Labels (B,) int64, or ``text_embedding`` (B, L, D) and ``text_mask`` (B, L).
        keys: B names of the sources of the rows.
    """

    latents: torch.Tensor
    condition: Condition
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device) -> Batch:
        """The same rows on `device`; from pinned memory without waiting."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same rows in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def __getitem__(self, rows: slice) -> Batch:
        part = self._map(lambda tensor: tensor[rows])
        return replace(part, keys=self.keys[rows])

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        condition = self.condition
        return Batch(
            change(self.latents),
            change(condition)
            if isinstance(condition, torch.Tensor)
            else {name: change(value) for name, value in condition.items()},
            self.keys,
        )


def local_batches(
    stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[Batch]:
    """The rows [start_row, stop_row) of the endless order, `batch_rows` at a time, read here.

    Batches run across the ends of epochs; the last one may be shorter.

    Raises:
        InvalidInputError: a part is damaged; before the first batch, the numbers are no stretch.
    """
    require(batch_rows > 0, "batch_rows", batch_rows, "not positive", "Give at least 1")
    tables = (table for task in stream.tasks(start_row, stop_row) for table in read(task))
    return batches_of(stream.manifest, tables, repeat(batch_rows))


def batches_of(
    manifest: LatentManifest, tables: Iterable[pa.Table], rows: Iterable[int]
) -> Iterator[Batch]:
    """The rows of `tables` in the same order, so many at a time (see `rebatch`)."""
    return (_batch(manifest, table) for table in rebatch(tables, rows))


def _batch(manifest: LatentManifest, table: pa.Table) -> Batch:
    condition: Condition
    if manifest.num_classes:
        condition = _tensor(table, LABEL).clone()
    else:
        condition = {
            TEXT_EMBEDDING: _tensor(table, TEXT_EMBEDDING).clone(),
            TEXT_MASK: _tensor(table, TEXT_MASK).bool(),
        }
    latents = manifest.normalise(_tensor(table, LATENT))
    return Batch(latents, condition, table.column(KEY).to_pylist())


def _tensor(table: pa.Table, name: str) -> torch.Tensor:
    """A column, in the memory of the table: not to be written to."""
    column = table.column(name)
    shape = column.type.shape if isinstance(column.type, pa.FixedShapeTensorType) else ()
    pieces = [
        torch.utils.dlpack.from_dlpack(chunk.storage.flatten() if shape else chunk)
        for chunk in column.chunks
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(len(table), *shape)
