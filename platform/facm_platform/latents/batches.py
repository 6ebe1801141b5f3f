"""Batches for training out of a `LatentStream`, whoever reads the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from facm_core.errors import require
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.stream import LatentStream, StreamTask, read
from facm_platform.latents.tables import KEY, labels_of, latents_of, rebatch

Reader = Callable[[Iterator[StreamTask]], Iterable[pa.Table]]
"""Gives the rows of all tasks, in order, in tables of any size."""


@dataclass(frozen=True)
class Batch:
    """Rows for one step.

    Attributes:
        latents: (B, C, H, W) float32, normalised by the manifest of the set.
        labels: (B,) int64.
        keys: B names of the sources of the rows.
    """

    latents: Tensor
    labels: Tensor
    keys: list[str]


def local_batches(
    stream: LatentStream, lane: int, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[Batch]:
    """The rows [start_row, stop_row) of a lane in batches of exactly `batch_rows`, read here.

    Batches run across the ends of epochs.

    Raises:
        InvalidInputError: the rows are no whole number of batches; a part is damaged.
    """
    return batches(_read_here, stream, lane, start_row, stop_row, batch_rows)


def batches(
    reader: Reader,
    stream: LatentStream,
    lane: int,
    start_row: int,
    stop_row: int,
    batch_rows: int,
) -> Iterator[Batch]:
    """`local_batches`, but with the rows read by `reader`."""
    require(batch_rows > 0, "batch_rows", batch_rows, "not positive", "Give at least 1")
    require(
        (stop_row - start_row) % batch_rows == 0,
        "stop_row",
        stop_row,
        f"the rows from {start_row} on are no whole number of batches of {batch_rows}",
        "Stop after a whole number of batches",
    )
    tables = reader(stream.tasks(lane, start_row, stop_row))
    return (_batch(stream.manifest, table) for table in rebatch(tables, batch_rows))


def _batch(manifest: LatentManifest, table: pa.Table) -> Batch:
    return Batch(
        latents=torch.from_numpy(manifest.normalise(latents_of(table))),
        labels=torch.from_numpy(labels_of(table).copy()),
        keys=table.column(KEY).to_pylist(),
    )


def _read_here(tasks: Iterator[StreamTask]) -> Iterator[pa.Table]:
    for task in tasks:
        yield from read(task)
