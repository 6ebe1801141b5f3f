"""How fast rows reach a training worker, beside the ways there are otherwise, on the same rows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, Dataset

from facm_core.errors import require
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.latents.manifest import LatentManifest, part_name
from facm_platform.latents.source import Worker, ray_batches
from facm_platform.latents.stream import LatentStream
from facm_platform.latents.tables import KEY, LABEL, LATENT, RowFormat, values_of
from facm_platform.latents.writer import write_part

FORMAT = RowFormat(latent_shape=(32, 16, 16), latent_dtype="float16", num_classes=1000)
_PART_ROWS = 16_384
_SHARD_ROWS = 10_000  # of the published extraction
_BLOCK_ROWS = 2048
_COLD_ROWS = 20_000
_TURNS = 3
_SAMPLE_SECONDS = 0.05
Way = Callable[[int], Iterator[int]]
"""Reads about so many rows, and gives the number of each batch."""

_PUBLISHED, _BARE = "one safe_open a sample", "bare pyarrow loop"


@dataclass(frozen=True)
class Timing:
    """One way of reading.

    Attributes:
        rows_per_second: From the call to the last row; the median of the turns, as the next.
        first_seconds: Until the first batch is there.
        cold_seconds: The same the first time, with processes to be started.
        driver_mib: Most private memory of this process, above what it had before. In a turn of
            its own, as the next: watching costs speed.
        worker_mib: Most private memory of any other process.
    """

    rows_per_second: float
    first_seconds: float
    cold_seconds: float
    driver_mib: float
    worker_mib: float


def benchmark(uri: str, rows: int = 100_000, batch: int = 256) -> JobResult:
    """Make a set of random rows at an empty place, and measure how fast they reach a worker.

    Args:
        uri: An empty folder, or ``s3://`` address, where the set stays.
        rows: How many float16 latents 32×16×16.
        batch: Rows of a batch.

    Raises:
        InvalidInputError: the place is not empty, or there are not enough rows for a batch.
    """
    uri = storage.absolute(uri)
    storage.check_reachable(uri)
    require(not storage.list_files(uri), "uri", uri, "it is not empty", "Choose another place")
    require(0 < batch <= rows, "batch", batch, f"not in [1, rows = {rows}]", "Give fewer")
    # As in a training worker, which leaves the other cores to those who read for it.
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="facm-benchmark-") as temporary, connected():
        folder = Path(temporary)
        here = str(folder / "set") if uri.startswith("s3://") else uri
        manifest = _write_set(here, rows)
        _write_shards(folder, rows)
        ways: dict[str, Way] = {
            _PUBLISHED: partial(_published, _published_loader(folder, manifest, batch), batch),
            _BARE: partial(_bare, here, manifest),
            "stream": partial(_stream, here, manifest, batch),
        }
        if here != uri:
            storage.upload_folder(Path(here), uri)
            ways["bytes from object store"] = partial(_bytes_only, uri, manifest)
            ways["stream from object store"] = partial(_stream, uri, manifest, batch)
        timings = _timed(ways, rows)
    print(_table(timings))
    return JobResult(
        run_id=None, run_name="latents benchmark", artifact_uri=uri, metrics=_metrics(timings)
    )


def _write_set(uri: str, rows: int) -> LatentManifest:
    starts = range(0, rows, _PART_ROWS)
    manifest = LatentManifest.of(
        FORMAT,
        (
            write_part(uri, part_name(index), _tables(start, min(start + _PART_ROWS, rows)), FORMAT)
            for index, start in enumerate(starts)
        ),
        autoencoder_id="identity",
        autoencoder_sha256="",
        encoding_sha256="",
        created_by="benchmark",
    )
    manifest.save(uri)
    return manifest


def _tables(start: int, stop: int) -> Iterator[pa.Table]:
    for first in range(start, stop, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, stop)
        values = _rows(last - first)
        yield FORMAT.table(values | {KEY: [str(row) for row in range(first, last)]})


def _rows(count: int) -> dict[str, NDArray[Any]]:
    """The same for every block: what numbers they are makes no difference to a reader."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((count, *FORMAT.latent_shape), np.float32)
    return {LATENT: latents.astype(np.float16), LABEL: random.integers(0, 1000, count)}


def _write_shards(folder: Path, rows: int) -> None:
    for index, start in enumerate(range(0, rows, _SHARD_ROWS)):
        count = min(_SHARD_ROWS, rows - start)
        block = _rows(min(count, _BLOCK_ROWS))
        repeats = -(-count // _BLOCK_ROWS)
        latents = np.concatenate([block[LATENT]] * repeats)[:count]
        labels = np.concatenate([block[LABEL]] * repeats)[:count]
        shard = {"latents": latents, "labels": labels}
        save_file(shard, folder / f"latents_rank00_shard{index:03d}.safetensors")


class _PublishedDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """As the published code reads: one `safe_open`, one index entry and one normalisation each."""

    def __init__(self, folder: Path, manifest: LatentManifest) -> None:
        self._mean, self._std = (
            torch.tensor(each)[:, None, None] for each in (manifest.mean, manifest.std)
        )
        self._index: list[tuple[str, int]] = []
        for file in sorted(folder.glob("latents_rank*_shard*.safetensors")):
            with safe_open(file, "pt") as opened:
                rows = opened.get_slice("labels").get_shape()[0]
            self._index += [(str(file), row) for row in range(rows)]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file, row = self._index[index]
        with safe_open(file, "pt") as opened:
            latent = opened.get_slice("latents")[row : row + 1]
            label = opened.get_slice("labels")[row : row + 1]
        return ((latent - self._mean) / self._std).squeeze(0), label.squeeze(0)


def _published_loader(
    folder: Path, manifest: LatentManifest, batch_rows: int
) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    return DataLoader(
        _PublishedDataset(folder, manifest),
        batch_size=batch_rows,
        shuffle=True,
        num_workers=2,
        # A fork of this process, with Ray's threads in it, was seen to hang. Kept, because such
        # workers take seconds to start.
        multiprocessing_context="forkserver",
        persistent_workers=True,
    )


def _published(
    loader: DataLoader[tuple[torch.Tensor, torch.Tensor]], batch_rows: int, rows: int
) -> Iterator[int]:
    for latents, _ in islice(loader, rows // batch_rows):
        yield len(latents)


def _bare(uri: str, manifest: LatentManifest, rows: int) -> Iterator[int]:
    for part in manifest.parts[: math.ceil(rows / _PART_ROWS)]:
        with pq.ParquetFile(Path(uri, part.name)) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                yield len(torch.from_numpy(values_of(table, LATENT).astype(np.float32)))


def _stream(uri: str, manifest: LatentManifest, batch_rows: int, rows: int) -> Iterator[int]:
    stream = LatentStream(uri, manifest, seed=0)
    stop = rows // batch_rows * batch_rows
    alone = Worker(0, 1, lambda make: make())
    for batch in ray_batches(stream, alone, 0, stop, batch_rows):
        yield len(batch)


def _bytes_only(uri: str, manifest: LatentManifest, rows: int) -> Iterator[int]:
    for part in manifest.parts[: math.ceil(rows / _PART_ROWS)]:
        store, path = storage.filesystem(storage.join(uri, part.name))
        with store.open_input_stream(path) as file:
            while file.read(16 << 20):
                pass
        yield part.rows


def _timed(ways: dict[str, Way], rows: int) -> dict[str, Timing]:
    """All rows, the ways taking turns, so that what else the machine does meets all of them."""
    cold = {name: _run(way, min(rows, _COLD_ROWS)).first_seconds for name, way in ways.items()}
    runs: dict[str, list[_Run]] = {name: [] for name in ways}
    for _ in range(_TURNS):
        for name, way in ways.items():
            # Memory that lay idle while others had their turn may have been taken away.
            _run(way, min(rows, _COLD_ROWS))
            runs[name].append(_run(way, rows))
    peaks = {name: _peak(way, rows) for name, way in ways.items()}
    return {
        name: Timing(
            rows_per_second=median(run.rows_per_second for run in runs[name]),
            first_seconds=median(run.first_seconds for run in runs[name]),
            cold_seconds=cold[name],
            driver_mib=peaks[name].driver_bytes / 2**20,
            worker_mib=peaks[name].worker_bytes / 2**20,
        )
        for name in ways
    }


@dataclass(frozen=True)
class _Run:
    rows_per_second: float
    first_seconds: float


def _run(way: Way, rows: int) -> _Run:
    started = time.perf_counter()
    counts = way(rows)
    read = next(counts)
    first_seconds = time.perf_counter() - started
    read += sum(counts)
    return _Run(read / (time.perf_counter() - started), first_seconds)


@dataclass
class _Peak:
    driver_bytes: float = 0.0
    worker_bytes: float = 0.0


def _peak(way: Way, rows: int) -> _Peak:
    """The most private memory during a run, of this process and of any other of Ray's."""
    me = psutil.Process()
    before = _private(me)
    peak = _Peak()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            peak.driver_bytes = max(peak.driver_bytes, _private(me) - before)
            for child in me.children(recursive=True):
                with suppress(psutil.Error):
                    if child.name().startswith("ray::"):
                        peak.worker_bytes = max(peak.worker_bytes, _private(child))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        sum(way(rows))
    finally:
        done.set()
        thread.join()
    return peak


def _private(process: psutil.Process) -> float:
    """Bytes that no other process shares; the object store is shared."""
    memory = process.memory_info()
    return float(memory.rss - memory.shared)


def _table(timings: dict[str, Timing]) -> str:
    published, bare = (timings[name].rows_per_second for name in (_PUBLISHED, _BARE))
    lines = [
        f"{'':26}{'rows/s':>9}{'x published':>12}{'x bare':>8}{'first s':>9}{'cold s':>8}"
        f"{'driver MiB':>12}{'worker MiB':>12}"
    ]
    for name, timing in timings.items():
        speed = timing.rows_per_second
        lines.append(
            f"{name:26}{speed:9,.0f}{speed / published:12.2f}{speed / bare:8.2f}"
            f"{timing.first_seconds:9.2f}{timing.cold_seconds:8.2f}"
            f"{timing.driver_mib:12,.0f}{timing.worker_mib:12,.0f}"
        )
    return "\n".join(lines)


def _metrics(timings: dict[str, Timing]) -> dict[str, float]:
    return {
        f"{name.replace(' ', '_')}.{field}": value
        for name, timing in timings.items()
        for field, value in vars(timing).items()
    }
