"""The read tasks of a stream, as Ray Data runs them. No torch in here.

It would be two seconds and half a gigabyte for each process that reads, before the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyarrow as pa
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from facm_platform.latents.stream import StreamTask, dealt_to, read
from facm_platform.latents.tables import packed

NUMBER = "number"
"""Column of a share: the number of its first row."""

# In how many rounds the rows of a task are dealt out: the first batch waits for two of them.
_ROUNDS = 4


class StreamDatasource(Datasource):
    """One Ray Data read task for each task of a stream, in order; a row is a worker's share."""

    def __init__(self, tasks: list[StreamTask], workers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes = sum(_bytes(task) for task in tasks)
        self._read_tasks = [
            ReadTask(
                partial(_dealt, task, workers),
                BlockMetadata(
                    num_rows=_ROUNDS * workers,
                    size_bytes=_bytes(task),
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for task in tasks
        ]

    def get_name(self) -> str:
        return "LatentStream"

    def estimate_inmemory_data_size(self) -> int:
        return self._bytes

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return self._read_tasks


def _bytes(task: StreamTask) -> int:
    return task.rows * task.format.drawn().row_bytes


def _dealt(task: StreamTask, workers: int) -> Iterator[pa.Table]:
    """Every worker's share of `task`, some rows of each at a time."""
    tables = read(task, workers)
    firsts = [dealt_to(worker, workers, task.number, workers).start for worker in range(workers)]
    for turn in range(_ROUNDS):
        for table, first in zip(tables, firsts, strict=True):
            start, stop = (len(table) * edge // _ROUNDS for edge in (turn, turn + 1))
            number = pa.array([first + start * workers])
            yield packed(table[start:stop]).append_column(NUMBER, number)
