"""Batches through Ray Data: the same as `local_batches`, but read ahead elsewhere, and once.

One data set is read for all workers. `streaming_split` deals its blocks out in turn; a block is a
worker's share of a read task, so that turn falls to the worker whose share it is. Each worker
makes sure of that: a share carries the number of its first row.

Only the first task of a stretch is read by every worker itself: Ray Data takes half a second to
start, and seconds where its processes have to start too, and does so meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import TypeVar, cast

import pyarrow as pa
import ray.data
import torch
from ray.data import DataIterator

from facm_core.errors import require
from facm_platform.latents._ray_data import ordered_and_quiet
from facm_platform.latents.batches import Batch, batches_of
from facm_platform.latents.reading import NUMBER, StreamDatasource
from facm_platform.latents.stream import LatentStream, StreamTask, dealt_to, read
from facm_platform.latents.tables import unpacked

READ_TASK_CPUS = 0.25
READ_TASKS_AT_ONCE = 2
READ_AHEAD_BYTES = 512 << 20

# Bounds the plan that Ray Data keeps in memory: a longer stream becomes several executions.
_TASKS_PER_EXECUTION = 1024

# A read task takes the same hundred megabytes as the one before, which glibc would give back to the
# system in between: fresh pages cost a tenth of the speed.
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}

Make = Callable[[], list[DataIterator]]
T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """One of those who read the same stretch of a stream together.

    Attributes:
        rank: In [0, count).
        count: How many there are.
        from_rank_zero: Runs its argument on rank 0 and gives every rank the result.
    """

    rank: int
    count: int
    from_rank_zero: Callable[[Make], list[DataIterator]]

    def rows(self, first: int, rows: int) -> range:
        """Which of the `rows` row numbers from `first` are this worker's."""
        return dealt_to(self.rank, self.count, first, rows)


def ray_batches(
    stream: LatentStream, worker: Worker, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[Batch]:
    """This worker's rows of each batch of `batch_rows`, read by Ray; a collective of all workers.

    Worker w of W gets the rows start_row ... stop_row - 1 whose number is w modulo W: of a batch
    that W does not divide, one row more or less than others. To be called where Ray is
    initialised; the cluster must have 0.25 CPU to spare beside the training workers, or the first
    batch never comes.

    Raises:
        InvalidInputError: the rows are no whole number of batches, or a batch has none for some
            worker; a part is damaged.
    """
    rows = stop_row - start_row
    require(
        batch_rows >= worker.count,
        "batch_rows",
        batch_rows,
        f"less than a row for each of {worker.count} workers",
        "Use larger batches or fewer workers",
    )
    require(
        rows > 0 and rows % batch_rows == 0,
        "stop_row",
        rows,
        f"no positive multiple of {batch_rows}",
        "Read whole batches",
    )
    return _batches(stream, worker, start_row, stop_row, batch_rows)


def _batches(
    stream: LatentStream, worker: Worker, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[Batch]:
    for first, *others in _executions(stream, start_row, stop_row, batch_rows):
        # By the caller's thread, a collective between the same two steps on all workers.
        shares = _dealt_by_ray(others, worker) if others else iter(())
        shares = chain(_read_here(first, worker), shares)
        rows = (worker.rows(number, batch_rows) for number in count(first.number, batch_rows))
        batches = batches_of(stream.manifest, shares, map(len, rows))
        if torch.cuda.is_available():
            batches = map(Batch.pinned, batches)
        yield from _one_ahead(batches)


def _executions(
    stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
) -> Iterator[list[StreamTask]]:
    """The tasks of a stretch, some at a time; each time whole batches."""
    row = start_row
    while row < stop_row:
        tasks = list(islice(stream.tasks(row, stop_row), _TASKS_PER_EXECUTION))
        stop = tasks[-1].number + tasks[-1].rows
        if stop < stop_row:
            stop = max(row + batch_rows, stop - (stop - row) % batch_rows)
            tasks = list(stream.tasks(row, stop))
        yield tasks
        row = stop


def _read_here(task: StreamTask, worker: Worker) -> Iterator[pa.Table]:
    """What this worker is dealt of `task`."""
    yield read(task, worker.count)[worker.rank]


def _dealt_by_ray(tasks: list[StreamTask], worker: Worker) -> Iterator[pa.Table]:
    """What this worker is dealt of `tasks`, in order; Ray Data starts at once. A collective."""
    iterators = worker.from_rank_zero(partial(_split, tasks, worker.count))
    return _one_ahead(_shares(iterators[worker.rank], tasks[0], worker))


def _shares(iterator: DataIterator, first: StreamTask, worker: Worker) -> Iterator[pa.Table]:
    """What comes of `iterator`, which begins with `first`, after making sure that it is right."""
    schema = first.format.drawn().schema
    expected = worker.rows(first.number, worker.count).start
    for share in _blocks(iterator):
        number, table = share.column(NUMBER)[0].as_py(), unpacked(share, schema)
        if number != expected:
            raise RuntimeError(f"Ray Data dealt row {number} to a worker that waits for {expected}")
        expected += len(table) * worker.count
        yield table


def _blocks(iterator: DataIterator) -> Iterable[pa.Table]:
    return iterator.iter_batches(
        batch_size=cast(int, None),  # as they come
        batch_format="pyarrow",
        prefetch_batches=0,  # see `_one_ahead`
    )


def _split(tasks: list[StreamTask], workers: int) -> list[DataIterator]:
    """The iterators of all workers over one data set."""
    dataset = ray.data.read_datasource(
        StreamDatasource(tasks, workers),
        num_cpus=READ_TASK_CPUS,
        concurrency=min(READ_TASKS_AT_ONCE, len(tasks)),
        override_num_blocks=len(tasks),
        runtime_env={"env_vars": _KEEP_MEMORY},
    )
    options = dataset.context.execution_options
    # Without a limit it takes a quarter of the object store, however slowly the rows are used.
    options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=READ_AHEAD_BYTES
    )
    # A share is a row, and a block of its own: nothing is to be joined or cut on the way.
    dataset.context.target_max_block_size = 1
    dataset = ordered_and_quiet(dataset)
    # One worker needs nobody to deal, which would be an actor to wait for.
    return dataset.streaming_split(workers, equal=True) if workers > 1 else [dataset.iterator()]


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each made while the one before is in use, and the first from now on."""
    thread = ThreadPoolExecutor(1, "one-ahead")
    return _following(items, thread, thread.submit(next, items, None))


def _following(
    items: Iterator[T], thread: ThreadPoolExecutor, coming: Future[T | None]
) -> Iterator[T]:
    with thread:
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
