"""The order of a set: exactly once per epoch, seeded, resumable at any row, in bounded memory."""

import dataclasses
import pickle
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.latents import LatentManifest, LatentStream, Part
from facm_platform.latents.stream import permutation, read
from facm_platform.latents.tables import values_of
from tests.latents.conftest import PART_ROWS, ROW_GROUP_ROWS, ROWS, SHAPE, rows

Set = tuple[str, LatentManifest]

EVERY_KEY = {key for part, count in enumerate(PART_ROWS) for key in rows(part, count)[2]}


def stream_of(latent_set: Set, *, seed: int = 0, groups: int = 3) -> LatentStream:
    uri, manifest = latent_set
    return LatentStream(uri, manifest, seed, window_groups=groups)


def read_rows(stream: LatentStream, start: int, stop: int) -> pa.Table:
    return pa.concat_tables(t for task in stream.tasks(start, stop) for t in read(task))


def keys(stream: LatentStream, start: int, stop: int) -> list[str]:
    found: list[str] = read_rows(stream, start, stop).column("key").to_pylist()
    return found


def group_of(key: str) -> tuple[str, int]:
    part, row = key.split("/")
    return part, int(row) // ROW_GROUP_ROWS


def huge(manifest: LatentManifest, parts: int) -> LatentManifest:
    """A set of 16,000 rows of 16 KB in each of `parts` parts."""
    return dataclasses.replace(
        manifest,
        rows=16_000 * parts,
        parts=tuple(
            Part(name=f"{i:05d}", rows=16_000, bytes=1, sha256="0" * 64, row_groups=(1000,) * 16)
            for i in range(parts)
        ),
        latent_shape=(32, 16, 16),
        latent_dtype="float16",
        mean=(0.0,) * 32,
        std=(1.0,) * 32,
    )


@pytest.mark.parametrize("groups", [1, 3, 8, 100])
def test_every_row_exactly_once_per_epoch(latent_set: Set, groups: int) -> None:
    stream = stream_of(latent_set, groups=groups)
    for epoch in range(3):
        seen = Counter(keys(stream, epoch * ROWS, (epoch + 1) * ROWS))
        assert seen == Counter(EVERY_KEY)


@pytest.mark.parametrize("workers", [2, 3, 5, 64])
@pytest.mark.parametrize("start", [0, 13, 100])
def test_workers_are_dealt_the_rows_in_turn(latent_set: Set, workers: int, start: int) -> None:
    stop = start + 4 * 64 * 3
    stream = stream_of(latent_set)
    order = read_rows(stream, start, stop)
    dealt: list[list[pa.Table]] = [[] for _ in range(workers)]
    for task in stream.tasks(start, stop):
        for worker, table in enumerate(read(task, workers)):
            dealt[worker].append(table)
    for worker in range(workers):
        mine = pa.concat_tables(dealt[worker])
        turn = slice((worker - start) % workers, None, workers)
        assert mine.column("key").to_pylist() == order.column("key").to_pylist()[turn]
        assert np.array_equal(values_of(mine, "latent"), values_of(order, "latent")[turn])
        assert np.array_equal(values_of(mine, "label"), values_of(order, "label")[turn])


def test_rows_stay_whole(latent_set: Set) -> None:
    table = read_rows(stream_of(latent_set), 0, 2 * ROWS)
    stored = {
        key: (latent, label)
        for part, count in enumerate(PART_ROWS)
        for latent, label, key in zip(*rows(part, count), strict=True)
    }
    latents, labels = values_of(table, "latent"), values_of(table, "label")
    assert latents.shape == (2 * ROWS, *SHAPE)
    for row, key in enumerate(table.column("key").to_pylist()):
        assert np.array_equal(latents[row], stored[key][0])
        assert labels[row] == stored[key][1]


def test_one_seed_one_order_and_each_epoch_another(latent_set: Set) -> None:
    first = keys(stream_of(latent_set), 0, 2 * ROWS)

    assert keys(stream_of(latent_set), 0, 2 * ROWS) == first
    assert keys(stream_of(latent_set, seed=1), 0, 2 * ROWS) != first
    assert first[:ROWS] != first[ROWS:]
    assert first[:ROWS] != sorted(first[:ROWS])


def test_each_epoch_takes_the_row_groups_together_that_chance_throws_together(
    latent_set: Set,
) -> None:
    windows = [
        {(group.part, group.index) for group in window.groups}
        for task in stream_of(latent_set).tasks(0, 2 * ROWS)
        for window in task.windows
    ]
    # 15 row groups, three at a time.
    assert [len(window) for window in windows] == [3] * 10
    first, second = ({frozenset(w) for w in half} for half in (windows[:5], windows[5:]))
    assert first != second
    assert set().union(*first) == set().union(*second)


def test_no_two_windows_are_shuffled_alike(latent_set: Set) -> None:
    seeds = [
        window.seed
        for seed in (0, 1)
        for task in stream_of(latent_set, seed=seed).tasks(0, 3 * ROWS)
        for window in task.windows
    ]
    assert len(seeds) == 2 * 3 * 5
    assert len(set(seeds)) == len(seeds)


def test_a_window_mixes_row_groups_from_all_over_the_set(latent_set: Set) -> None:
    """Of a set in 15 row groups, one of the first, the middle and the last five."""
    number = {("0", i): i for i in range(8)} | {("1", i): 8 + i for i in range(6)} | {("2", 0): 14}
    order = [number[group_of(key)] for key in keys(stream_of(latent_set), 0, ROWS)]
    first = order[: 3 * ROW_GROUP_ROWS - 6]
    assert {group // 5 for group in first} == {0, 1, 2}
    # Shuffled: the first seven rows are not of one row group.
    assert len(set(order[:7])) >= 2
    assert max(Counter(order[:7]).values()) < 7


@pytest.mark.parametrize("seed", range(20))
def test_no_correlation_between_storage_and_output(latent_set: Set, seed: int) -> None:
    """50,000 rows of 16 KB in 50 row groups, whose order by chance alone would have 0.14."""
    manifest = huge(latent_set[1], 4)
    groups = (1000,) * 12 + (500,)
    parts = tuple(
        dataclasses.replace(part, rows=12_500, row_groups=groups) for part in manifest.parts
    )
    stream = LatentStream("unused", dataclasses.replace(manifest, rows=50_000, parts=parts), seed)
    place = {
        (part.name, index): number * 12_500 + index * 1000
        for number, part in enumerate(parts)
        for index in range(13)
    }
    for epoch in range(3):
        output, storage = [], []
        for task in stream.tasks(epoch * 50_000, (epoch + 1) * 50_000):
            for window in task.windows:
                order = permutation(window.stop, window.seed)
                stored = np.concatenate(
                    [place[g.part, g.index] + np.arange(g.rows) for g in window.groups]
                )
                output.append(window.number + np.arange(window.stop))
                storage.append(stored[order])
        correlation = np.corrcoef(np.concatenate(output), np.concatenate(storage))[0, 1]
        assert abs(correlation) < 0.02


@pytest.mark.parametrize("start", [1, 13, 20, 45, 90, 91, 101, 200])
def test_a_resumed_stream_gives_the_rest_of_the_undisturbed_one(
    latent_set: Set, start: int
) -> None:
    stream = stream_of(latent_set)
    undisturbed = read_rows(stream, 0, 230)
    resumed = read_rows(stream, start, 230)

    assert resumed.column("key").to_pylist() == undisturbed.column("key").to_pylist()[start:]
    assert np.array_equal(values_of(resumed, "latent"), values_of(undisturbed, "latent")[start:])
    assert np.array_equal(values_of(resumed, "label"), values_of(undisturbed, "label")[start:])


def test_tasks_follow_each_other_without_a_gap(latent_set: Set, monkeypatch) -> None:
    monkeypatch.setattr("facm_platform.latents.stream.TASK_BYTES", 1)
    tasks = list(stream_of(latent_set).tasks(17, 400))
    assert (tasks[0].number, tasks[-1].number + tasks[-1].rows) == (17, 400)
    assert all(one.number + one.rows == other.number for one, other in pairwise(tasks))
    assert len(tasks) > 4 * 5


def test_the_order_is_the_one_of_the_first_release(latent_set: Set) -> None:
    """A run that was started before an upgrade must find its order again after it."""
    assert permutation(8, (1, 2, 3)).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert keys(stream_of(latent_set), 0, 4) == ["0/00037", "1/00016", "0/00023", "1/00018"]


def test_a_tiny_set_for_many_epochs_is_a_few_tasks(latent_set: Set) -> None:
    tasks = list(stream_of(latent_set, groups=100).tasks(0, 3000 * ROWS))
    # 3,000 epochs of 91 rows of 128 bytes are 34.9 MB, in tasks of at most 16 MiB.
    assert sum(task.rows for task in tasks) == 273_000
    assert len(tasks) == 3


def test_memory_follows_row_groups_not_rows(latent_set: Set) -> None:
    """A set of 100 million rows of 16 KB: a few megabytes to plan."""
    stream = LatentStream("s3://bucket/set", huge(latent_set[1], 6250), 0)

    tracemalloc.start()
    tasks = list(islice(stream.tasks(170_000_000, 300_000_000), 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # A few numbers for each of 100,000 row groups; one for each row were 800 MB.
    assert peak < 50e6
    assert max(len(pickle.dumps(task)) for task in tasks) < 4000
    assert {task.rows for task in tasks[1:]} == {8000}


def test_a_flipped_byte_is_found_and_its_part_named(own_set: Set) -> None:
    uri, manifest = own_set
    file = Path(uri, manifest.parts[1].name)
    content = bytearray(file.read_bytes())
    needle = rows(1, 37)[0][20].tobytes()
    content[content.index(needle) + 17] ^= 1
    file.write_bytes(content)

    stream = stream_of((uri, LatentManifest.load(uri)))
    with pytest.raises(InvalidInputError, match=r"part = .*part-00001.parquet.*CRC.*Restore"):
        read_rows(stream, 0, ROWS)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other", "other shape"])
def test_a_damaged_part_is_named(own_set: Set, damage: str) -> None:
    uri, manifest = own_set
    file = Path(uri, manifest.parts[1].name)
    if damage == "gone":
        file.unlink()
    elif damage == "other":
        file.write_bytes(Path(uri, manifest.parts[0].name).read_bytes())
    elif damage == "other shape":
        table = pq.read_table(file)
        latent = pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (2, 4, 3)),
            table.column("latent").combine_chunks().storage,
        )
        pq.write_table(table.set_column(0, "latent", latent), file, row_group_size=7)
    else:
        file.write_bytes(file.read_bytes()[: -100 if damage == "cut" else 0])

    with pytest.raises(InvalidInputError, match=r"part = .*part-00001.parquet"):
        read_rows(stream_of((uri, manifest)), 0, ROWS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"seed": -1}, "seed = -1: negative"),
        ({"groups": 0}, "window_groups = 0: not positive"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    latent_set: Set, arguments: dict[str, int], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        stream_of(latent_set, **arguments)


def test_a_stretch_that_ends_before_it_starts_is_refused(latent_set: Set) -> None:
    with pytest.raises(InvalidInputError, match="start_row = 2"):
        stream_of(latent_set).tasks(2, 1)
