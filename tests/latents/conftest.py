"""Small latent sets with several parts and row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pytest

from facm_platform.latents import LatentManifest
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import row_bytes, to_table
from facm_platform.latents.writer import PartLayout, part_name, write_part

SHAPE = (2, 3, 4)
ROW_GROUP_ROWS = 7
# In 8, 6 and 1 row groups; no multiple of 2 or 3, so that lanes differ in length.
PART_ROWS = (50, 37, 4)
ROWS = 91
ROW_BYTES = row_bytes(SHAPE, "float32")


def rows(part: int, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Latents, labels and keys that are a function of the key, so that a mix-up shows."""
    rng = np.random.default_rng(part)
    latents = rng.normal(5.0, 2.0, (count, *SHAPE)).astype(np.float32)
    return latents, np.arange(count) % 10, [f"{part}/{row:05d}" for row in range(count)]


class MakeSet(Protocol):
    def __call__(self, uri: str, part_rows: Sequence[int] = ...) -> LatentManifest: ...


@pytest.fixture(scope="session")
def make_set() -> MakeSet:
    """Writes a set with the given rows per part, in row groups of seven rows."""

    def make(uri: str, part_rows: Sequence[int] = PART_ROWS) -> LatentManifest:
        layout = PartLayout(
            shape=SHAPE,
            dtype="float32",
            num_classes=10,
            row_group_bytes=ROW_GROUP_ROWS * ROW_BYTES,
        )

        def tables(part: int, count: int) -> Iterator[pa.Table]:
            latents, labels, keys = rows(part, count)
            for start in range(0, count, 11):
                stretch = slice(start, start + 11)
                yield to_table(latents[stretch], labels[stretch], keys[stretch])

        parts = []
        statistics = ChannelStatistics.empty(SHAPE[0])
        for index, count in enumerate(part_rows):
            part, part_statistics = write_part(uri, part_name(index), tables(index, count), layout)
            parts.append(part)
            statistics = statistics.merge(part_statistics)
        manifest = LatentManifest(
            rows=sum(part_rows),
            latent_shape=SHAPE,
            latent_dtype="float32",
            num_classes=10,
            mean=tuple(statistics.mean.tolist()),
            std=tuple(statistics.std().tolist()),
            autoencoder_id="identity",
            autoencoder_sha256="0",
            parts=tuple(parts),
            encoding_sha256="0",
            created_by="test",
        )
        manifest.save(uri)
        return manifest

    return make


@pytest.fixture(scope="session")
def latent_set(
    make_set: MakeSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, LatentManifest]:
    """A set of 91 rows in 3 parts. Not to be changed."""
    uri = str(tmp_path_factory.mktemp("latents") / "set")
    return uri, make_set(uri)


@pytest.fixture
def own_set(make_set: MakeSet, tmp_path: Path) -> tuple[str, LatentManifest]:
    """The same set, to be damaged."""
    uri = str(tmp_path / "set")
    return uri, make_set(uri)
