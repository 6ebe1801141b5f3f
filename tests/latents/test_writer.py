"""Parts and their statistics."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.latents import LatentManifest
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import RowFormat, rebatch
from facm_platform.latents.writer import write_part
from tests.latents.conftest import FORMAT, PART_ROWS, ROW_GROUP_ROWS, SHAPE, rows


def test_any_parquet_reader_finds_the_rows(latent_set: tuple[str, LatentManifest]) -> None:
    uri, manifest = latent_set
    part = manifest.parts[0]
    file = Path(uri, part.name)
    table = pq.read_table(file)
    latents, labels, keys = rows(0, 50)

    assert table.column("latent").type == pa.fixed_shape_tensor(pa.float32(), SHAPE)
    stored = table.column("latent").combine_chunks().to_numpy_ndarray()
    assert np.array_equal(stored, latents)
    assert table.column("label").to_pylist() == labels.tolist()
    assert table.column("key").to_pylist() == keys
    assert part.row_groups == (ROW_GROUP_ROWS,) * 7 + (1,)
    assert part.bytes == file.stat().st_size
    assert part.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert sorted(f.name for f in Path(uri).iterdir()) == [
        "manifest.json",
        *(part.name for part in manifest.parts),
    ]


def test_statistics_of_the_set_are_those_of_numpy(
    latent_set: tuple[str, LatentManifest],
) -> None:
    _, manifest = latent_set
    every = np.concatenate([rows(part, count)[0] for part, count in enumerate(PART_ROWS)])
    values = every.astype(np.float64)

    np.testing.assert_allclose(manifest.mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, values.std((0, 2, 3)), rtol=1e-12)


def test_merged_statistics_keep_their_precision_far_from_zero() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(1000.0, 0.1, (5000, 3, 2, 2))
    cuts = [0, 1, 7, 1000, 1001, 4321, 5000]
    merged = ChannelStatistics.empty(3)
    for start, stop in itertools.pairwise(cuts):
        merged = merged.merge(ChannelStatistics.of(values[start:stop]))

    exact = values.astype(np.longdouble)
    assert merged.count == 20_000
    np.testing.assert_allclose(merged.mean, exact.mean((0, 2, 3)).astype(float), rtol=1e-13)
    np.testing.assert_allclose(merged.std(), exact.std((0, 2, 3)).astype(float), rtol=1e-12)


def test_a_constant_channel_cannot_be_normalised() -> None:
    latents = np.random.default_rng(0).normal(size=(4, 2, 3, 3))
    latents[:, 1] = 0.5
    with pytest.raises(InvalidInputError, match=r"channels \[1\] hold one constant"):
        ChannelStatistics.of(latents).std()


def test_statistics_of_moments_are_those_of_all_draws() -> None:
    """By the law of total variance; a million draws agree."""
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(2, 3, (50, 2, 2, 2)), rng.normal(-1, 1, (50, 2, 2, 2))
    statistics = ChannelStatistics.of(np.concatenate([mean, log_variance], 1), moments=True)

    variance = mean.var((0, 2, 3)) + np.exp(log_variance).mean((0, 2, 3))
    np.testing.assert_allclose(statistics.mean, mean.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.std(), np.sqrt(variance), rtol=1e-12)
    drawn = mean + np.exp(log_variance / 2) * rng.normal(size=(2500, *mean.shape))
    np.testing.assert_allclose(statistics.std(), drawn.std((0, 1, 3, 4)), rtol=0.01)


def test_mirrored_latents_count(tmp_path: Path) -> None:
    format = RowFormat(latent_shape=(1, 2, 2), latent_dtype="float32", flip=True, num_classes=1)
    rng = np.random.default_rng(0)
    latents, mirrored = rng.normal(size=(2, 20, 1, 2, 2)).astype(np.float32)
    values = {"latent": latents, "latent_flip": mirrored, "label": [0] * 20, "key": ["k"] * 20}
    _, statistics = write_part(str(tmp_path), "part-00000.parquet", [format.table(values)], format)
    both = np.concatenate([latents, mirrored]).astype(np.float64)
    np.testing.assert_allclose(statistics.mean, both.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(statistics.std(), both.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_rebatch_keeps_every_row_in_order(size: int) -> None:
    latents, labels, keys = rows(0, 30)
    table = FORMAT.table({"latent": latents, "label": labels, "key": keys})
    pieces = [table[a:b] for a, b in [(0, 1), (1, 20), (20, 30)]]

    batches = list(rebatch(pieces, itertools.repeat(size)))

    assert [key for b in batches for key in b.column("key").to_pylist()] == keys
    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert len(batches) == -(-30 // size)


@pytest.mark.parametrize(
    ("row", "label", "value", "problem"),
    [
        (4, 3, np.nan, "not finite"),
        (5, 3, np.inf, "not finite"),
        (6, 10, 0.0, r"not in \[0, 10\)"),
        (7, -1, 0.0, r"not in \[0, 10\)"),
    ],
)
def test_a_row_that_would_spoil_training_is_refused_by_key(
    tmp_path: Path, row: int, label: int, value: float, problem: str
) -> None:
    latents, labels, keys = rows(0, 20)
    latents[row, 0, 1, 1], labels[row] = value, label
    table = FORMAT.table({"latent": latents, "label": labels, "key": keys})
    with pytest.raises(InvalidInputError, match=rf"key = '0/0000{row}'.*{problem}"):
        write_part(str(tmp_path), "part-00000.parquet", [table], FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_a_part_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="a part without rows"):
        write_part(str(tmp_path), "part-00000.parquet", [], FORMAT)
    assert list(tmp_path.iterdir()) == []
