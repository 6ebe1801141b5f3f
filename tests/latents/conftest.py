"""Small latent sets with several parts and row groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pytest

from facm_core.autoencoders import load_autoencoder
from facm_platform.latents import LatentManifest
from facm_platform.latents.manifest import part_name
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from tests.latents.pictures import Place

SHAPE = (2, 3, 4)
ROW_GROUP_ROWS = 7
# In 8, 6 and 1 row groups; no multiple of 2 or 3, so that lanes differ in length.
PART_ROWS = (50, 37, 4)
ROWS = 91
FORMAT = RowFormat(latent_shape=SHAPE, latent_dtype="float32", num_classes=10)


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
        def tables(part: int, count: int) -> Iterator[pa.Table]:
            latents, labels, keys = rows(part, count)
            for start in range(0, count, 11):
                stretch = slice(start, start + 11)
                values = {"latent": latents, "label": labels, "key": keys}
                yield FORMAT.table({name: value[stretch] for name, value in values.items()})

        made = [
            write_part(
                uri,
                part_name(index),
                tables(index, count),
                FORMAT,
                row_group_bytes=ROW_GROUP_ROWS * FORMAT.row_bytes,
            )
            for index, count in enumerate(part_rows)
        ]
        manifest = LatentManifest.of(
            FORMAT,
            made,
            autoencoder_id="identity",
            autoencoder_sha256=load_autoencoder("identity").sha256,
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


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "images"))
    return Place(f"{request.getfixturevalue('bucket')}/some/images")


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "images"))
