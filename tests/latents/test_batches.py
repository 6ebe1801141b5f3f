"""Batches: whole, normalised, and the same whether Ray Data or the process itself reads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.data import DataIterator

from facm_core.errors import InvalidInputError
from facm_platform.latents import Batch, LatentManifest, LatentStream, Part, local_batches
from facm_platform.latents.manifest import part_name
from facm_platform.latents.reading import _dealt
from facm_platform.latents.source import Make, Worker, ray_batches
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.stream import StreamTask
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from tests.latents.conftest import FORMAT, PART_ROWS, ROWS, MakeSet, rows

Set = tuple[str, LatentManifest]


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are some for Ray after the first one, which a worker reads itself."""
    monkeypatch.setattr("facm_platform.latents.stream.TASK_BYTES", 30 * FORMAT.row_bytes)


def stream_of(latent_set: Set) -> LatentStream:
    uri, manifest = latent_set
    return LatentStream(uri, manifest, 3, window_groups=3)


def of_all_workers(
    stream: LatentStream, count: int, start: int, stop: int, batch: int
) -> list[list[Batch]]:
    """What each of `count` threads gets that read together."""
    made: list[Future[list[DataIterator]]] = [Future() for _ in range(100)]

    def work(rank: int) -> list[Batch]:
        executions = iter(made)

        def from_rank_zero(make: Make) -> list[DataIterator]:
            execution = next(executions)
            if rank == 0:
                execution.set_result(make())
            return execution.result(timeout=60)

        return list(ray_batches(stream, Worker(rank, count, from_rank_zero), start, stop, batch))

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count)))


def alone(make: Make) -> list[DataIterator]:
    return make()


def share(batches: list[Batch], rank: int, count: int) -> list[Batch]:
    return [
        Batch(b.latents[rank::count], b.condition[rank::count], b.keys[rank::count])
        for b in batches
    ]


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.keys for batch in left] == [batch.keys for batch in right]
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.condition, other.condition)


def test_batches_are_whole_across_epochs_and_normalised(latent_set: Set) -> None:
    _, manifest = latent_set
    batches = list(local_batches(stream_of(latent_set), 0, 200, 32))

    assert [tuple(batch.latents.shape) for batch in batches] == [(32, 2, 3, 4)] * 6 + [(8, 2, 3, 4)]
    assert {batch.latents.dtype for batch in batches} == {torch.float32}
    assert {batch.condition.dtype for batch in batches} == {torch.int64}
    assert [len(batch) for batch in batches] == [32] * 6 + [8]

    epoch = torch.cat([batch.latents for batch in batches])[:ROWS].double()
    assert epoch.mean((0, 2, 3)).abs().max() < 1e-6
    assert (epoch.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6

    part, row = batches[1].keys[5].split("/")
    raw = rows(int(part), PART_ROWS[int(part)])[0][int(row)].astype(np.float64)
    mean, std = (np.array(v).reshape(2, 1, 1) for v in (manifest.mean, manifest.std))
    np.testing.assert_allclose(batches[1].latents[5].numpy(), (raw - mean) / std, rtol=1e-4)
    assert int(batches[1].condition[5]) == int(row) % 10


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ((0, 70, 32), "stop_row = 70: no positive multiple of 32"),
        ((0, 66, 1), "batch_rows = 1: less than a row for each of 2 workers"),
        ((0, 0, 32), "stop_row = 0: no positive"),
    ],
)
def test_a_stretch_that_workers_cannot_share_is_refused(
    latent_set: Set, rows: tuple[int, int, int], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        ray_batches(stream_of(latent_set), Worker(0, 2, alone), *rows)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("count", "rows"), [(1, 24), (2, 24), (3, 24), (3, 40)])
def test_ray_deals_out_the_same_batches(latent_set: Set, count: int, rows: int) -> None:
    here = list(local_batches(stream_of(latent_set), 12, 12 + 240, rows))
    dealt = of_all_workers(stream_of(latent_set), count, 12, 12 + 240, rows)
    for rank in range(count):
        # Where a batch begins, in the turn of the workers.
        turns = [(rank - 12 - step * rows) % count for step in range(240 // rows)]
        assert_equal(
            dealt[rank],
            [share([batch], turn, count)[0] for batch, turn in zip(here, turns, strict=True)],
        )


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Set:
    """50,000 rows in three parts of 17 row groups each."""
    uri = str(tmp_path_factory.mktemp("large"))
    format = RowFormat(latent_shape=(1, 2, 2), latent_dtype="float16", num_classes=10)
    random = np.random.default_rng(0)

    def part(index: int, start: int, stop: int) -> tuple[Part, ChannelStatistics]:
        values = {
            "latent": random.normal(size=(stop - start, 1, 2, 2)),
            "label": np.arange(start, stop) % 10,
            "key": [str(row) for row in range(start, stop)],
        }
        table = format.table(values)
        return write_part(uri, part_name(index), [table], format, 1000 * format.row_bytes)

    edges = [0, 17_000, 34_000, 50_000]
    manifest = LatentManifest.of(
        format,
        [part(index, *edge) for index, edge in enumerate(pairwise(edges))],
        autoencoder_id="identity",
        autoencoder_sha256="",
        encoding_sha256="",
        created_by="test",
    )
    manifest.save(uri)
    return uri, manifest


def dealt_keys(stream: LatentStream, count: int, start: int, stop: int) -> list[int]:
    """All rows that `count` workers get, in the order of the steps."""
    workers = of_all_workers(stream, count, start, stop, 600)
    assert {len(batches) for batches in workers} == {(stop - start) // 600}
    assert {len(batch) for batches in workers for batch in batches} == {600 // count}
    steps = zip(*workers, strict=True)
    return [int(key) for step in steps for batch in step for key in batch.keys]


@pytest.mark.usefixtures("ray_cluster")
def test_an_epoch_of_50_000_rows_that_changes_workers_on_the_way(large_set: Set) -> None:
    """Two epochs are 166 steps and 400 rows: on one worker, then three, then two."""
    uri, manifest = large_set
    stream = LatentStream(uri, manifest, 5)
    found = dealt_keys(stream, 1, 0, 30_000)
    found += dealt_keys(stream, 3, 30_000, 60_000)
    found += dealt_keys(stream, 2, 60_000, 100_200)

    assert sorted(found[:49_800]) == sorted(set(found[:49_800]))
    for count in (1, 3):
        again = dealt_keys(stream, count, 0, 100_200)
        # The same rows in each step, whoever has which.
        for step in range(0, 100_200, 600):
            assert set(again[step : step + 600]) == set(found[step : step + 600])
    in_order = [int(k) for b in local_batches(stream, 0, 100_000, 50_000) for k in b.keys]
    for epoch in (in_order[:50_000], in_order[50_000:]):
        assert sorted(epoch) == list(range(50_000))
        assert abs(np.corrcoef(epoch, np.arange(50_000))[0, 1]) < 0.02
    assert in_order[:50_000] != in_order[50_000:]
    for step in range(0, 99_600, 600):
        assert set(in_order[step : step + 600]) == set(found[step : step + 600])
    other = next(iter(local_batches(LatentStream(uri, manifest, 6), 0, 600, 600)))
    assert set(map(int, other.keys)) != set(found[:600])


@pytest.mark.usefixtures("ray_cluster")
def test_slow_tasks_and_many_executions_change_nothing(
    latent_set: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("facm_platform.latents.source._TASKS_PER_EXECUTION", 5)

    threads = []

    def noted(make: Make) -> list[DataIterator]:
        threads.append(threading.current_thread())
        return make()

    stream = stream_of(latent_set)
    tasks = list(stream.tasks(7, 7 + 320))
    assert len(tasks) > 10
    slow = tasks[1].number

    def with_delay(task: StreamTask, workers: int) -> Iterator[pa.Table]:
        time.sleep(2.0 if task.number == slow else 0.0)
        return _dealt(task, workers)

    # Ray's first task is slow, for the others to overtake.
    monkeypatch.setattr("facm_platform.latents.reading._dealt", with_delay)
    here = list(local_batches(stream, 7, 7 + 320, 16))
    assert_equal(list(ray_batches(stream, Worker(0, 1, noted), 7, 7 + 320, 16)), here)
    assert len(here) == 20
    # A collective: in another thread, it could meet others' of the training loop in any order.
    assert len(threads) > 1
    assert set(threads) == {threading.current_thread()}


@pytest.mark.usefixtures("ray_cluster")
def test_rows_dealt_to_the_wrong_worker_are_noticed(
    latent_set: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confused(task: StreamTask, workers: int) -> list[pa.Table]:
        return list(_dealt(task, workers))[::-1]

    monkeypatch.setattr("facm_platform.latents.reading._dealt", confused)
    with pytest.raises(RuntimeError, match=r"dealt row \d+ to a worker that waits for \d"):
        of_all_workers(stream_of(latent_set), 2, 0, 64, 32)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("part", "by_ray"), [(0, False), (2, True)])
def test_a_damaged_part_is_named_whoever_reads_it(own_set: Set, part: int, by_ray: bool) -> None:
    uri, manifest = own_set
    name = manifest.parts[part].name
    stream = stream_of(own_set)
    first, *_ = stream.tasks(0, 90)
    assert by_ray != any(group.part == name for w in first.windows for group in w.groups)
    Path(uri, name).unlink()
    with pytest.raises(InvalidInputError, match=rf"{name}.*damaged or missing"):
        list(ray_batches(stream, Worker(0, 1, alone), 0, 90, 5))


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_on_an_object_store_gives_the_same_batches(
    latent_set: Set, bucket: str, make_set: MakeSet
) -> None:
    uri = f"{bucket}/sets/one"
    written = make_set(uri)
    manifest = LatentManifest.load(uri)

    assert manifest == written
    assert manifest.sha256 == latent_set[1].sha256
    here = list(local_batches(stream_of(latent_set), 9, 9 + 128, 16))
    there = stream_of((uri, manifest))
    assert_equal(list(local_batches(there, 9, 9 + 128, 16)), here)
    assert_equal(list(ray_batches(there, Worker(0, 1, alone), 9, 9 + 128, 16)), here)
