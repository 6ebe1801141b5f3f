"""The order of a set: exactly once per epoch, seeded, resumable at any row, in bounded memory."""

import dataclasses
import itertools
import pickle
import time
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.latents import LatentManifest, LatentStream, Part
from facm_platform.latents.stream import permutation, read
from facm_platform.latents.tables import labels_of, latents_of
from tests.latents.conftest import PART_ROWS, ROW_BYTES, ROW_GROUP_ROWS, ROWS, SHAPE, rows

Set = tuple[str, LatentManifest]

EVERY_KEY = {key for part, count in enumerate(PART_ROWS) for key in rows(part, count)[2]}


def stream_of(latent_set: Set, *, seed: int = 0, lanes: int = 1, window: int = 20) -> LatentStream:
    uri, manifest = latent_set
    return LatentStream(uri, manifest, seed, lanes, window_bytes=window * ROW_BYTES)


def read_rows(stream: LatentStream, lane: int, start: int, stop: int) -> pa.Table:
    return pa.concat_tables(t for task in stream.tasks(lane, start, stop) for t in read(task))


def keys(stream: LatentStream, lane: int, start: int, stop: int) -> list[str]:
    found: list[str] = read_rows(stream, lane, start, stop).column("key").to_pylist()
    return found


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 20, 1000])
def test_every_row_exactly_once_per_epoch_over_all_lanes(
    latent_set: Set, lanes: int, window: int
) -> None:
    stream = stream_of(latent_set, lanes=lanes, window=window)
    for epoch in range(3):
        seen: Counter[str] = Counter()
        for lane in range(lanes):
            rows_per_epoch = stream.rows_per_epoch(lane)
            start = epoch * rows_per_epoch
            seen.update(keys(stream, lane, start, start + rows_per_epoch))
        assert seen == Counter(EVERY_KEY)
        assert seen.total() == ROWS


def test_rows_stay_whole(latent_set: Set) -> None:
    table = read_rows(stream_of(latent_set), 0, 0, 2 * ROWS)
    stored = {
        key: (latent, label)
        for part, count in enumerate(PART_ROWS)
        for latent, label, key in zip(*rows(part, count), strict=True)
    }
    latents, labels = latents_of(table), labels_of(table)
    for row, key in enumerate(table.column("key").to_pylist()):
        assert np.array_equal(latents[row], stored[key][0])
        assert labels[row] == stored[key][1]


def test_one_seed_one_order_and_each_epoch_another(latent_set: Set) -> None:
    first = keys(stream_of(latent_set), 0, 0, 2 * ROWS)

    assert keys(stream_of(latent_set), 0, 0, 2 * ROWS) == first
    assert keys(stream_of(latent_set, seed=1), 0, 0, 2 * ROWS) != first
    assert first[:ROWS] != first[ROWS:]
    assert first[:ROWS] != sorted(first[:ROWS])


def test_each_epoch_takes_the_row_groups_in_another_order(latent_set: Set) -> None:
    in_order = keys(stream_of(latent_set, window=1), 0, 0, 2 * ROWS)
    groups = [(key[0], int(key[2:]) // ROW_GROUP_ROWS) for key in in_order]
    changes = [group for group, _ in itertools.groupby(groups)]
    first, second = changes[:15], changes[-15:]
    assert len(set(first)) == len(set(second)) == 15
    assert first != second
    assert first != sorted(first)


def test_no_two_windows_are_shuffled_alike(latent_set: Set) -> None:
    seeds = [
        window.seed
        for seed in (0, 1)
        for lane in (0, 1)
        for task in stream_of(latent_set, seed=seed, lanes=2).tasks(lane, 0, 3 * 45)
        for window in task.windows
    ]
    # Two seeds, two lanes, three epochs, three windows of at most twenty rows.
    assert len(seeds) >= 2 * 2 * 3 * 3
    assert len(set(seeds)) == len(seeds)


def test_a_window_mixes_its_row_groups(latent_set: Set) -> None:
    """Without the shuffle of the window, the first seven rows would be of one row group."""
    groups = {
        (k[:1], int(k[2:]) // ROW_GROUP_ROWS)
        for k in keys(stream_of(latent_set, window=90), 0, 0, 7)
    }
    assert len(groups) >= 3


@pytest.mark.parametrize("start", [1, 13, 20, 45, 89, 90, 101, 200])
def test_a_resumed_lane_gives_the_rest_of_the_undisturbed_one(latent_set: Set, start: int) -> None:
    stream = stream_of(latent_set, lanes=2)
    undisturbed = read_rows(stream, 1, 0, 230)
    resumed = read_rows(stream, 1, start, 230)

    assert resumed.column("key").to_pylist() == undisturbed.column("key").to_pylist()[start:]
    assert np.array_equal(latents_of(resumed), latents_of(undisturbed)[start:])
    assert np.array_equal(labels_of(resumed), labels_of(undisturbed)[start:])


def test_the_order_is_the_one_of_the_first_release(latent_set: Set) -> None:
    """A run that was started before an upgrade must find its order again after it."""
    assert permutation(8, (1, 2, 3)).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]
    assert keys(stream_of(latent_set), 0, 0, 4) == ["1/00023", "1/00024", "1/00027", "1/00022"]


def test_a_tiny_set_for_many_epochs_is_a_few_tasks(latent_set: Set) -> None:
    tasks = list(stream_of(latent_set, window=1000).tasks(0, 0, 3000 * ROWS))
    # 3,000 epochs of 91 rows of 128 bytes are 34.9 MB, in tasks of at most 16 MiB.
    assert sum(task.rows for task in tasks) == 273_000
    assert len(tasks) == 3


def test_memory_follows_row_groups_not_rows(latent_set: Set) -> None:
    """A set of 100 million rows of 16 KB: a few hundred kilobytes, and no time, to plan."""
    _, manifest = latent_set
    parts = tuple(
        Part(name=f"{i:05d}", rows=16_000, bytes=1, sha256="0" * 64, row_groups=(1000,) * 16)
        for i in range(6250)
    )
    huge = dataclasses.replace(
        manifest,
        rows=100_000_000,
        parts=parts,
        latent_shape=(32, 16, 16),
        latent_dtype="float16",
        mean=(0.0,) * 32,
        std=(1.0,) * 32,
    )
    stream = LatentStream("s3://bucket/set", huge, 0, 3)

    started = time.perf_counter()
    tracemalloc.start()
    tasks = list(islice(stream.tasks(1, 170_000_000, 300_000_000), 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    # One number for each of 100,000 row groups, a few times over; one for each row were 800 MB.
    assert peak < 10e6
    assert time.perf_counter() - started < 2
    assert max(len(pickle.dumps(task)) for task in tasks) < 4000
    assert 60e6 < max(task.rows for task in tasks) * 16_384 < 68e6


def test_a_flipped_byte_is_found_and_its_part_named(own_set: Set) -> None:
    uri, manifest = own_set
    file = Path(uri, manifest.parts[1].name)
    content = bytearray(file.read_bytes())
    needle = rows(1, 37)[0][20].tobytes()
    content[content.index(needle) + 17] ^= 1
    file.write_bytes(content)

    stream = stream_of((uri, LatentManifest.load(uri)))
    with pytest.raises(InvalidInputError, match=r"part = .*part-00001.parquet.*CRC.*Restore"):
        read_rows(stream, 0, 0, ROWS)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "other", "other shape"])
def test_a_damaged_part_is_named(own_set: Set, make_set, damage: str) -> None:
    uri, manifest = own_set
    file = Path(uri, manifest.parts[1].name)
    if damage == "gone":
        file.unlink()
    elif damage == "other":
        file.write_bytes(Path(uri, manifest.parts[0].name).read_bytes())
    elif damage == "other shape":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        latent = pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), (2, 4, 3)),
            table.column("latent").combine_chunks().storage,
        )
        pq.write_table(table.set_column(0, "latent", latent), file, row_group_size=7)
    else:
        file.write_bytes(file.read_bytes()[: -100 if damage == "cut" else 0])

    with pytest.raises(InvalidInputError, match=r"part = .*part-00001.parquet"):
        read_rows(stream_of((uri, manifest)), 0, 0, ROWS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"seed": -1}, "seed = -1: negative"),
        ({"lanes": 0}, "lanes = 0: not positive"),
        ({"lanes": 92}, "lanes = 92: the set has only 91 rows"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(
    latent_set: Set, arguments: dict[str, int], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        stream_of(latent_set, **arguments)


def test_a_lane_or_row_that_is_not_there_is_refused(latent_set: Set) -> None:
    stream = stream_of(latent_set, lanes=2)
    with pytest.raises(InvalidInputError, match=r"lane = 2: not in \[0, 2\)"):
        stream.tasks(2, 0, 1)
    with pytest.raises(InvalidInputError, match="start_row = 2"):
        stream.tasks(0, 2, 1)


def test_shape_is_that_of_the_set(latent_set: Set) -> None:
    assert latents_of(read_rows(stream_of(latent_set), 0, 0, 5)).shape == (5, *SHAPE)
