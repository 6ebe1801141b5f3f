"""The endless, seeded order of a latent set, and how to read any stretch of it. No Ray in here.

One epoch: the row groups in a random order, and inside each row group its rows in a random order.
That sequence of N rows is cut into V lanes, lane v being its rows [v*N//V, (v+1)*N//V); so every
row occurs exactly once per epoch over all lanes. A lane is the endless concatenation of its pieces
of epochs 0, 1, 2, ...; each piece is cut into windows whose rows are shuffled once more.

All randomness is drawn from (seed, epoch, what is permuted), so any row of any lane can be found
without reading what comes before it: resuming is starting at another row. What is held in memory
is one number per row group and one window of rows, whatever the size of the set.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.tables import (
    COLUMNS,
    KEY,
    LatentShape,
    labels_of,
    latents_of,
    row_bytes,
    schema,
    to_table,
)

WINDOW_BYTES = 64 << 20
TASK_BYTES = 16 << 20

# What a random permutation is of; the first number of its seed.
_GROUPS, _ROWS, _WINDOW = 0, 1, 2

Seed = tuple[int, ...]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """Positions [start, stop) of one row group, once its `rows` rows are permuted by `seed`."""

    part: str
    row_group: int
    rows: int
    seed: Seed
    start: int
    stop: int


@dataclass(frozen=True)
class Window:
    """Positions [start, stop) of the rows of `slices`, once these are permuted by `seed`."""

    slices: tuple[Slice, ...]
    seed: Seed
    start: int
    stop: int


@dataclass(frozen=True)
class StreamTask:
    """A stretch of a lane that can be read by itself, anywhere: a few kilobytes when pickled."""

    uri: str
    latent_shape: LatentShape
    latent_dtype: str
    windows: tuple[Window, ...]

    @property
    def rows(self) -> int:
        """Rows that `read` gives for it."""
        return sum(window.stop - window.start for window in self.windows)


@dataclass(frozen=True)
class LatentStream:
    """The order of a set for one seed and one number of lanes.

    Attributes:
        uri: Where the set lies (see `facm_platform.storage.absolute`).
        manifest: Its manifest.
        seed: Not negative.
        lanes: Number of independent readers, one lane each.
        window_bytes: Rows shuffled together at once. Part of the order: another value, another one.
    """

    uri: str
    manifest: LatentManifest
    seed: int
    lanes: int
    window_bytes: int = WINDOW_BYTES

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "negative", "Give 0 or more")
        require(self.lanes > 0, "lanes", self.lanes, "not positive", "Use at least one worker")
        require(
            self.lanes <= self.manifest.rows,
            "lanes",
            self.lanes,
            f"the set has only {self.manifest.rows} rows",
            "Use fewer workers",
        )

    def rows_per_epoch(self, lane: int) -> int:
        """Rows of the piece that `lane` has of every epoch."""
        start, stop = self._piece(lane)
        return stop - start

    def tasks(self, lane: int, start_row: int, stop_row: int) -> Iterator[StreamTask]:
        """The rows [start_row, stop_row) of the endless `lane`, in order, as pieces of work.

        Rows count from the start of epoch 0. A task holds one window, or as many small ones as
        make 16 MiB of rows, so that a tiny set does not become a task per epoch.
        """
        require(0 <= lane < self.lanes, "lane", lane, f"not in [0, {self.lanes})", "Use the rank")
        require(
            0 <= start_row <= stop_row,
            "start_row",
            start_row,
            f"not in [0, stop_row = {stop_row}]",
            "Count rows from the start of epoch 0",
        )
        return self._group(self._windows(lane, start_row, stop_row))

    def _group(self, windows: Iterator[Window]) -> Iterator[StreamTask]:
        limit = max(1, TASK_BYTES // self._row_bytes)
        pending: list[Window] = []
        pending_rows = 0
        for window in windows:
            rows = window.stop - window.start
            if pending and pending_rows + rows > limit:
                yield self._task(pending)
                pending, pending_rows = [], 0
            pending.append(window)
            pending_rows += rows
        if pending:
            yield self._task(pending)

    def _task(self, windows: list[Window]) -> StreamTask:
        manifest = self.manifest
        return StreamTask(self.uri, manifest.latent_shape, manifest.latent_dtype, tuple(windows))

    def _windows(self, lane: int, start_row: int, stop_row: int) -> Iterator[Window]:
        piece_start, piece_stop = self._piece(lane)
        length = piece_stop - piece_start
        count = math.ceil(length / max(1, self.window_bytes // self._row_bytes))
        edges = [index * length // count for index in range(count + 1)]
        layout: tuple[int, Indices, Indices] | None = None
        row = start_row
        while row < stop_row:
            epoch, offset = divmod(row, length)
            if layout is None or layout[0] != epoch:
                layout = (epoch, *self._epoch(epoch))
            index = int(np.searchsorted(edges, offset, side="right")) - 1
            first, last = edges[index], edges[index + 1]
            stop = min(last, offset + stop_row - row)
            slices = self._slices(*layout, piece_start + first, piece_start + last)
            seed = (_WINDOW, self.seed, epoch, lane, self.lanes, index)
            yield Window(tuple(slices), seed, offset - first, stop - first)
            row += stop - offset

    def _slices(
        self, epoch: int, order: Indices, edges: Indices, start: int, stop: int
    ) -> Iterator[Slice]:
        """The pieces of row groups that make the positions [start, stop) of an epoch."""
        at = int(np.searchsorted(edges, start, side="right")) - 1
        while edges[at] < stop:
            group = int(order[at])
            part, row_group, rows = self._row_group(group)
            begin, end = max(start - int(edges[at]), 0), min(stop - int(edges[at]), rows)
            yield Slice(part, row_group, rows, (_ROWS, self.seed, epoch, group), begin, end)
            at += 1

    def _epoch(self, epoch: int) -> tuple[Indices, Indices]:
        """Row groups in the order of `epoch`, and the position where each starts, then N."""
        order = permutation(len(self._group_rows), (_GROUPS, self.seed, epoch))
        return order, np.concatenate([[0], np.cumsum(self._group_rows[order])])

    def _row_group(self, group: int) -> tuple[str, int, int]:
        """Part, index in the part, and rows of the row group number `group` of the set."""
        at = int(np.searchsorted(self._part_edges, group, side="right")) - 1
        part = self.manifest.parts[at]
        index = group - int(self._part_edges[at])
        return part.name, index, part.row_groups[index]

    def _piece(self, lane: int) -> tuple[int, int]:
        rows = self.manifest.rows
        return lane * rows // self.lanes, (lane + 1) * rows // self.lanes

    @cached_property
    def _row_bytes(self) -> int:
        return row_bytes(self.manifest.latent_shape, self.manifest.latent_dtype)

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


def read(task: StreamTask) -> Iterator[pa.Table]:
    """The rows of `task` in order, one table (latent, label, key) per window.

    Raises:
        InvalidInputError: a part that is missing, damaged (checksum) or not what the manifest
            says; it is named.
    """
    reader = _RowGroupReader(task)
    for window in task.windows:
        yield _read_window(reader, window)


def _read_window(reader: _RowGroupReader, window: Window) -> pa.Table:
    rows = sum(piece.stop - piece.start for piece in window.slices)
    # Row `order[k]` of the slices comes k-th, so a row goes to the inverse permutation of its own.
    order = permutation(rows, window.seed)
    position = np.empty_like(order)
    position[order] = np.arange(rows)

    task = reader.task
    latents = np.empty((rows, *task.latent_shape), task.latent_dtype)
    labels = np.empty(rows, np.int64)
    keys: list[pa.Array] = []
    done = 0
    for piece in window.slices:
        group = reader.read(piece)
        take = permutation(piece.rows, piece.seed)[piece.start : piece.stop]
        put = position[done : done + len(take)]
        latents[put] = latents_of(group)[take]
        labels[put] = labels_of(group)[take]
        keys.append(group.column(KEY).combine_chunks().take(pa.array(take)))
        done += len(take)
    ordered_keys = pa.concat_arrays(keys).take(pa.array(order))
    table = to_table(latents, labels, ordered_keys)
    return table.slice(window.start, window.stop - window.start)


class _RowGroupReader:
    """Reads row groups of one task, and keeps the last ones: neighbouring windows share them."""

    def __init__(self, task: StreamTask) -> None:
        self.task = task
        self._schema = schema(task.latent_shape, task.latent_dtype)
        self._kept: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def read(self, piece: Slice) -> pa.Table:
        """All rows of the row group of `piece`, in stored order."""
        place = (piece.part, piece.row_group)
        if place not in self._kept:
            self._kept[place] = self._load(piece)
        self._kept.move_to_end(place)
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > TASK_BYTES:
            self._kept.popitem(last=False)
        return self._kept[place]

    def _load(self, piece: Slice) -> pa.Table:
        uri = storage.join(self.task.uri, piece.part)
        store, path = storage.filesystem(uri)
        try:
            with (
                storage.explained(uri, "part"),
                pq.ParquetFile(
                    path, filesystem=store, pre_buffer=True, page_checksum_verification=True
                ) as file,
            ):
                table = file.read_row_group(piece.row_group, columns=list(COLUMNS))
        except (OSError, pa.ArrowException, IndexError) as error:
            raise _bad_part(uri, f"damaged or missing ({str(error).splitlines()[0]})") from error
        if table.schema.types != self._schema.types:
            raise _bad_part(uri, f"its columns are {table.schema.types}, not {self._schema.types}")
        nulls = sum(column.null_count for column in table.columns)
        if len(table) != piece.rows or nulls:
            raise _bad_part(
                uri,
                f"its row group {piece.row_group} has {len(table)} rows and {nulls} nulls "
                f"where the manifest says {piece.rows} and none",
            )
        return table


def _bad_part(uri: str, problem: str) -> InvalidInputError:
    remedy = "Restore this file, or encode the set again with jobs/encode.py and overwrite=true"
    return InvalidInputError("part", uri, problem, remedy)
