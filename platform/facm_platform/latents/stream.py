"""The endless, seeded order of a latent set, and how to read any stretch of it. No Ray in here.

One epoch: storage is divided into a few strata of equal size; a window holds one row group of each,
drawn at random, and shuffles their rows. So whatever the storage was sorted by, every window is
drawn from all over it, and every row group is read whole and once.

Rows are numbered through the windows, epoch after epoch, from 0 without end. That order depends on
the seed only. Of the row numbers, worker w of W is dealt w, w + W, w + 2W, ...: every row occurs
once per epoch over all workers, the k-th batch of all workers together holds the same rows for
any number of them, and resuming is starting at another row, with the same workers or with others.

All randomness is drawn from (seed, epoch, what is permuted), so any row can be found without
reading what comes before it. What is held in memory is one number per row group and one window of
rows, whatever the size of the set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from facm_core.errors import require
from facm_platform import storage
from facm_platform.latents.draw import latents_drawn
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.parts import bad_part, opened_part
from facm_platform.latents.tables import KEY, LABEL, LATENT, RowFormat, values_of

WINDOW_GROUPS = 8
TASK_BYTES = 16 << 20

# How many orders of an epoch's row groups are drawn; the one that is correlated least with the
# order in storage is taken, which chance alone does not grant a set of a few dozen.
_CANDIDATES = 16

# Row groups of a window that are read at once, to hide the latency of an object store. For the life
# of the process: a thread that ends leaves behind what Arrow had allocated for it.
_READERS = 4
_POOL = ThreadPoolExecutor(_READERS, "read-row-group")

# What randomness is for; the first number of its seed.
_GROUPS, _ROWS = 0, 1

Seed = tuple[int, ...]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class RowGroup:
    """Place and size of a row group."""

    part: str
    index: int
    rows: int


@dataclass(frozen=True)
class Window:
    """Positions [start, stop) of the rows of `groups`, once these are permuted by `seed`.

    `number` is the number of the first of them in the endless order.
    """

    groups: tuple[RowGroup, ...]
    seed: Seed
    start: int
    stop: int
    number: int


@dataclass(frozen=True)
class StreamTask:
    """A stretch of the order, to be read by itself, anywhere: a few kilobytes when pickled."""

    uri: str
    format: RowFormat
    windows: tuple[Window, ...]

    @property
    def number(self) -> int:
        """Number of its first row."""
        return self.windows[0].number

    @property
    def rows(self) -> int:
        """How many rows follow each other from there."""
        return sum(window.stop - window.start for window in self.windows)


@dataclass(frozen=True)
class LatentStream:
    """The order of a set for one seed.

    Attributes:
        uri: Where the set lies (see `facm_platform.storage.absolute`).
        manifest: Its manifest.
        seed: Not negative.
        window_groups: Row groups shuffled together. Part of the order: another value, another one.
    """

    uri: str
    manifest: LatentManifest
    seed: int
    window_groups: int = WINDOW_GROUPS

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "negative", "Give 0 or more")
        groups = self.window_groups
        require(groups > 0, "window_groups", groups, "not positive", "Give at least 1")

    def tasks(self, start_row: int, stop_row: int) -> Iterator[StreamTask]:
        """The rows [start_row, stop_row) of the endless order, as pieces of work in order.

        A task holds one window, or as many small ones as make 16 MiB of rows, so that a tiny set
        does not become a task per epoch.
        """
        require(
            0 <= start_row <= stop_row,
            "start_row",
            start_row,
            f"not in [0, stop_row = {stop_row}]",
            "Count rows from the start of epoch 0",
        )
        return self._group(self._windows(start_row, stop_row))

    def _group(self, windows: Iterator[Window]) -> Iterator[StreamTask]:
        limit = max(1, TASK_BYTES // self.manifest.row_bytes)
        pending: list[Window] = []
        pending_rows = 0
        for window in windows:
            rows = window.stop - window.start
            if pending and pending_rows + rows > limit:
                yield StreamTask(self.uri, self._format, tuple(pending))
                pending, pending_rows = [], 0
            pending.append(window)
            pending_rows += rows
        if pending:
            yield StreamTask(self.uri, self._format, tuple(pending))

    def _windows(self, start_row: int, stop_row: int) -> Iterator[Window]:
        epoch, offset = divmod(start_row, self.manifest.rows)
        number = start_row
        while number < stop_row:
            windows = self._epoch(epoch)
            edges = np.cumsum([0, *(self._group_rows[groups].sum() for groups in windows)])
            first = int(np.searchsorted(edges, offset, side="right")) - 1
            for index in range(first, len(windows)):
                start = max(0, offset - int(edges[index]))
                rows = int(edges[index + 1] - edges[index])
                stop = min(rows, start + stop_row - number)
                groups = tuple(self._row_group(int(group)) for group in windows[index])
                seed = (_ROWS, self.seed, epoch, index)
                yield Window(groups, seed, start, stop, number)
                number += stop - start
                if number == stop_row:
                    return
            epoch, offset = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[Indices]:
        """Numbers of the row groups of each window of `epoch`, in order."""
        count = len(self._group_rows)
        strata = min(self.window_groups, count)
        stratum = np.arange(count) * strata // count
        # Within its stratum, the how-manieth a row group is drawn, and so the window it is in.
        first = np.searchsorted(stratum, stratum)
        candidates = []
        for candidate in range(_CANDIDATES if strata < count else 1):
            drawn = permutation(count, (_GROUPS, self.seed, epoch, candidate))
            order = drawn[np.argsort(stratum[drawn], kind="stable")]
            window = np.empty_like(order)
            window[order] = np.arange(count) - first
            candidates.append(window)
        window = min(candidates, key=lambda w: abs(_correlation(w, self._group_rows)))
        in_order = np.argsort(window, kind="stable")
        return np.split(in_order, np.flatnonzero(np.diff(window[in_order])) + 1)

    def _row_group(self, group: int) -> RowGroup:
        """The row group number `group` of the set."""
        at = int(np.searchsorted(self._part_edges, group, side="right")) - 1
        part = self.manifest.parts[at]
        index = group - int(self._part_edges[at])
        return RowGroup(part.name, index, part.row_groups[index])

    @cached_property
    def _format(self) -> RowFormat:
        return self.manifest.row_format

    @cached_property
    def _group_rows(self) -> Indices:
        return np.array([rows for part in self.manifest.parts for rows in part.row_groups])

    @cached_property
    def _part_edges(self) -> Indices:
        return np.cumsum([0, *(len(part.row_groups) for part in self.manifest.parts)])


def permutation(count: int, seed: Seed) -> Indices:
    """A random order of range(count).

    By sorting raw generator output: numpy promises that output for ever, but not what
    `Generator.permutation` makes of it, and a resumed run must find the order it left.
    """
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(keys, kind="stable")


def dealt_to(worker: int, workers: int, first: int, rows: int) -> range:
    """Which of the `rows` row numbers from `first` are dealt to `worker`."""
    return range(first + (worker - first) % workers, first + rows, workers)


def read(task: StreamTask, workers: int = 1) -> list[pa.Table]:
    """The rows of `task`, dealt out: table w holds those whose number is w modulo `workers`.

    Latents are drawn where the set holds moments or mirrored twins (see `LatentStream`): by the
    window and the place of a row in it, so that they are as reproducible as the order.

    Raises:
        InvalidInputError: a part that is missing, damaged (checksum) or not what the manifest
            says; it is named.
    """
    hands = [_Hand(task, worker, workers) for worker in range(workers)]
    groups = _RowGroups(task)
    for window in task.windows:
        _deal(window, groups, hands)
    return [hand.table() for hand in hands]


def _deal(window: Window, groups: _RowGroups, hands: list[_Hand]) -> None:
    rows = sum(group.rows for group in window.groups)
    # Row order[k] of the window comes k-th, so a row goes to the inverse permutation of its own.
    order = permutation(rows, window.seed)
    position = np.empty_like(order)
    position[order] = np.arange(rows)
    done = 0
    for index, (group, table) in enumerate(groups.of(window)):
        at = position[done : done + group.rows]
        done += group.rows
        wanted = np.flatnonzero((at >= window.start) & (at < window.stop))
        numbers = window.number + at[wanted] - window.start
        values = {name: values_of(table, name) for name in table.column_names if name != KEY}
        values[LATENT] = latents_drawn(groups.task.format, values, (*window.seed, index))
        keys = table.column(KEY)
        for hand in hands:
            mine = numbers % len(hands) == hand.worker
            hand.take(values, keys, wanted[mine], numbers[mine])


class _Hand:
    """What one worker gets of a task."""

    def __init__(self, task: StreamTask, worker: int, workers: int) -> None:
        self.worker = worker
        self._numbers = dealt_to(worker, workers, task.number, task.rows)
        self._format = task.format.drawn()
        rows = len(self._numbers)
        self._values = {
            name: np.empty((rows, *shape), dtype)
            for name, (dtype, shape) in self._format.tensors.items()
        }
        if self._format.num_classes:
            self._values[LABEL] = np.empty(rows, np.int64)
        self._keys: list[pa.ChunkedArray] = []
        self._slots: list[Indices] = []

    def take(
        self,
        values: dict[str, NDArray[np.generic]],
        keys: pa.Array,
        rows: Indices,
        numbers: Indices,
    ) -> None:
        """Put the given `rows` of a row group where their numbers belong."""
        slots = (numbers - self._numbers.start) // self._numbers.step
        for name, mine in self._values.items():
            # All of them, where one worker takes a whole window: without the copy.
            mine[slots] = values[name] if len(rows) == len(values[name]) else values[name][rows]
        self._keys.append(keys.take(pa.array(rows)))
        self._slots.append(slots)

    def table(self) -> pa.Table:
        """All rows, in order."""
        keys = pa.chunked_array([c for part in self._keys for c in part.chunks], pa.string())
        order = np.argsort(np.concatenate(self._slots))
        values = {**self._values, KEY: keys.take(pa.array(order)).combine_chunks()}
        return self._format.table(values)


class _RowGroups:
    """Reads the row groups of a task; keeps them where its windows, small ones, share them."""

    def __init__(self, task: StreamTask) -> None:
        self.task = task
        self._kept: dict[RowGroup, pa.Table] = {}

    def of(self, window: Window) -> Iterator[tuple[RowGroup, pa.Table]]:
        """Every row group of the window with all its rows, in stored order."""
        coming: deque[Future[pa.Table]] = deque()
        for index, group in enumerate(window.groups):
            for ahead in window.groups[index + len(coming) : index + _READERS]:
                coming.append(_POOL.submit(self._table, ahead))
            yield group, coming.popleft().result()

    def _table(self, group: RowGroup) -> pa.Table:
        if group in self._kept:
            return self._kept[group]
        table = _load(self.task, group)
        if len(self.task.windows) > 1:
            self._kept[group] = table
        return table


def _load(task: StreamTask, group: RowGroup) -> pa.Table:
    uri = storage.join(task.uri, group.part)
    schema = task.format.schema
    with opened_part(uri) as file:
        table = file.read_row_group(group.index, columns=schema.names)
    if table.schema.names != schema.names or table.schema.types != schema.types:
        raise bad_part(uri, f"its columns are {table.schema.types}, not {schema.types}")
    nulls = sum(column.null_count for column in table.columns)
    if len(table) != group.rows or nulls:
        raise bad_part(
            uri,
            f"its row group {group.index} has {len(table)} rows and {nulls} nulls "
            f"where the manifest says {group.rows} and none",
        )
    return table


def _correlation(window: Indices, rows: Indices) -> float:
    """Between the place in storage and the window, over all rows."""
    place = np.cumsum(rows) - rows / 2
    place, when = (x - np.average(x, weights=rows) for x in (place, window))
    spread = np.average(place**2, weights=rows) * np.average(when**2, weights=rows)
    return float(np.average(place * when, weights=rows) / np.sqrt(spread)) if spread else 0.0
