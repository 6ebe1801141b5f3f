"""Batches: whole, normalised, and the same whether Ray Data or the process itself reads them."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.latents import Batch, LatentManifest, LatentStream, local_batches
from facm_platform.latents.source import ray_batches
from facm_platform.latents.stream import StreamTask, read
from tests.latents.conftest import PART_ROWS, ROW_BYTES, ROWS, MakeSet, rows

Set = tuple[str, LatentManifest]


def stream_of(latent_set: Set, lanes: int = 2) -> LatentStream:
    uri, manifest = latent_set
    return LatentStream(uri, manifest, 3, lanes, window_bytes=20 * ROW_BYTES)


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.keys for batch in left] == [batch.keys for batch in right]
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.labels, other.labels)


def test_batches_are_whole_across_epochs_and_normalised(latent_set: Set) -> None:
    _, manifest = latent_set
    batches = list(local_batches(stream_of(latent_set, lanes=1), 0, 0, 192, 32))

    assert [tuple(batch.latents.shape) for batch in batches] == [(32, 2, 3, 4)] * 6
    assert {batch.latents.dtype for batch in batches} == {torch.float32}
    assert {batch.labels.dtype for batch in batches} == {torch.int64}
    assert {len(batch.keys) for batch in batches} == {32}

    epoch = torch.cat([batch.latents for batch in batches])[:ROWS].double()
    assert epoch.mean((0, 2, 3)).abs().max() < 1e-6
    assert (epoch.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6

    part, row = batches[1].keys[5].split("/")
    raw = rows(int(part), PART_ROWS[int(part)])[0][int(row)].astype(np.float64)
    mean, std = (np.array(v).reshape(2, 1, 1) for v in (manifest.mean, manifest.std))
    np.testing.assert_allclose(batches[1].latents[5].numpy(), (raw - mean) / std, rtol=1e-4)


def test_rows_that_are_no_whole_number_of_batches_are_refused(latent_set: Set) -> None:
    with pytest.raises(InvalidInputError, match=r"stop_row = 70: .* batches of 32"):
        local_batches(stream_of(latent_set), 0, 0, 70, 32)


@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_the_same_batches(latent_set: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many tasks and executions, and a slow first task for the others to overtake.
    monkeypatch.setattr("facm_platform.latents.stream.TASK_BYTES", 30 * ROW_BYTES)
    monkeypatch.setattr("facm_platform.latents.source._TASKS_PER_EXECUTION", 5)

    def read_with_delay(task: StreamTask) -> Iterator[pa.Table]:
        starts_inside_a_window = task.windows[0].start > 0
        time.sleep(2.0 if starts_inside_a_window else 0.0)
        return read(task)

    monkeypatch.setattr("facm_platform.latents.source.read", read_with_delay)
    stream = stream_of(latent_set)
    assert len(list(stream.tasks(1, 7, 7 + 320))) > 10
    for lane, start in ((0, 0), (1, 7)):
        here = list(local_batches(stream, lane, start, start + 320, 16))
        assert_equal(list(ray_batches(stream, lane, start, start + 320, 16)), here)
        assert len(here) == 20


@pytest.mark.usefixtures("ray_cluster")
def test_ray_says_which_part_is_damaged(own_set: Set) -> None:
    uri, manifest = own_set
    LatentManifest.load(uri)
    Path(uri, manifest.parts[0].name).unlink()
    with pytest.raises(InvalidInputError, match=r"part-00000.parquet.*damaged or missing"):
        list(ray_batches(stream_of(own_set), 0, 0, 45, 5))


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_on_an_object_store_gives_the_same_batches(
    latent_set: Set, bucket: str, make_set: MakeSet
) -> None:
    uri = f"{bucket}/sets/one"
    written = make_set(uri)
    manifest = LatentManifest.load(uri)

    assert manifest == written
    assert manifest.sha256 == latent_set[1].sha256
    here = list(local_batches(stream_of(latent_set), 1, 9, 9 + 128, 16))
    assert_equal(list(local_batches(stream_of((uri, manifest)), 1, 9, 9 + 128, 16)), here)
    assert_equal(list(ray_batches(stream_of((uri, manifest)), 1, 9, 9 + 128, 16)), here)
