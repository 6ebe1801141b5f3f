"""Batches through Ray Data: the same as `local_batches`, bit for bit, but read ahead elsewhere.

Each training worker drives a small data set over its own lane, so that lanes are disjoint by
construction and every worker starts again by itself at the row where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from facm_platform.latents._ray_data import ordered_and_quiet
from facm_platform.latents.batches import Batch, batches, local_batches
from facm_platform.latents.stream import LatentStream, StreamTask, read
from facm_platform.latents.tables import row_bytes, schema

__all__ = ["Batch", "local_batches", "ray_batches"]

READ_TASK_CPUS = 0.25
READ_TASKS_AT_ONCE = 2
READ_AHEAD_BYTES = 512 << 20

# Bounds the plan that Ray Data keeps in memory: a longer stream becomes several executions.
_TASKS_PER_EXECUTION = 1024


def ray_batches(
    stream: LatentStream, lane: int, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[Batch]:
    """The rows [start_row, stop_row) of a lane in batches of exactly `batch_rows`, read by Ray.

    Batches run across the ends of epochs. To be called where Ray is initialised; the cluster must
    have 0.25 CPU to spare beside the training workers, or the first batch never comes.

    Raises:
        InvalidInputError: the rows are no whole number of batches; a part is damaged.
    """
    return batches(_read_with_ray, stream, lane, start_row, stop_row, batch_rows)


class _StreamDatasource(Datasource):
    """One Ray Data read task for each task of a stream, in order."""

    def __init__(self, tasks: list[StreamTask]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tasks = tasks

    def get_name(self) -> str:
        return "LatentStream"

    def estimate_inmemory_data_size(self) -> int:
        return sum(_bytes(task) for task in self._tasks)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        return [
            ReadTask(
                partial(read, task),
                BlockMetadata(
                    num_rows=task.rows, size_bytes=_bytes(task), input_files=None, exec_stats=None
                ),
                schema=schema(task.latent_shape, task.latent_dtype),
                per_task_row_limit=per_task_row_limit,
            )
            for task in self._tasks
        ]


def _bytes(task: StreamTask) -> int:
    return task.rows * row_bytes(task.latent_shape, task.latent_dtype)


def _read_with_ray(tasks: Iterator[StreamTask]) -> Iterator[pa.Table]:
    while portion := list(islice(tasks, _TASKS_PER_EXECUTION)):
        yield from _dataset(portion).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        )


def _dataset(tasks: list[StreamTask]) -> ray.data.Dataset:
    dataset = ray.data.read_datasource(
        _StreamDatasource(tasks),
        num_cpus=READ_TASK_CPUS,
        concurrency=min(READ_TASKS_AT_ONCE, len(tasks)),
        override_num_blocks=len(tasks),
    )
    # Without a limit it takes a quarter of the object store, however slowly the rows are used.
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=READ_AHEAD_BYTES)
    dataset.context.execution_options.resource_limits = limits
    return ordered_and_quiet(dataset)
