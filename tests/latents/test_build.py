"""Sets made part by part: interrupted, continued, contended, with inputs that are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.latents.build import BuildersConfig, Piece, RowReader, SetBuild
from facm_platform.latents.inspection import stats
from facm_platform.latents.manifest import Quarantined
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.latents.stream import read
from facm_platform.latents.tables import RowFormat

FORMAT = RowFormat(latent_shape=(1, 2, 2), latent_dtype="float32", num_classes=3)

pytestmark = pytest.mark.usefixtures("ray_cluster")


def reader(
    broken: tuple[int, ...] = (), fails_at: int = -1, null: NullText | None = None
) -> Callable[[], RowReader]:
    """Rows that are a function of their number; pickled by value, as workers know no tests."""
    format = FORMAT

    class Numbers:
        def null_text(self) -> NullText | None:
            return null

        def rows(self, piece: Piece) -> Iterator[pa.Table | Quarantined]:
            for number in range(piece["start"], piece["stop"]):
                if number == fails_at:
                    raise InvalidInputError("shard", number, "the disk is full", "Free some")
                if number in broken:
                    yield Quarantined(key=str(number), reason="it is odd")
                    continue
                latent = np.random.default_rng(number).normal(size=(1, 1, 2, 2))
                values = {"latent": latent, "label": [number % 3], "key": [str(number)]}
                yield format.table(values)

    return Numbers


def build(uri: str, make: Callable[[], RowReader], **changes: Any) -> SetBuild:
    """Forty rows in four parts."""

    def pieces() -> Iterator[Piece]:
        for start in range(0, 40, 10):
            yield {"start": start, "stop": start + 10}

    settings: dict[str, Any] = {
        "uri": uri,
        "format": FORMAT,
        "sha256": "one",
        "pieces": pieces,
        "reader": make,
        "workers": BuildersConfig(count=1),
        "manifest": {
            "autoencoder_id": "identity",
            "autoencoder_sha256": "0",
            "created_by": "test",
        },
        "max_quarantined": 0.1,
        "overwrite": False,
    }
    return SetBuild(**settings | changes)


def contents(uri: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(uri, name)) for name in storage.list_files(uri)}


def keys(uri: str) -> set[str]:
    manifest = LatentManifest.load(uri)
    tasks = LatentStream(uri, manifest, 0).tasks(0, manifest.rows)
    found = [key for task in tasks for key in read(task)[0].column("key").to_pylist()]
    assert len(found) == len(set(found)) == manifest.rows
    return set(found)


def causes(error: BaseException | None) -> str:
    return "" if error is None else f"{error} {causes(error.__cause__)}"


def test_what_is_done_stays_done_and_ends_with_the_same_bytes(tmp_path: Path, bucket: str) -> None:
    undisturbed = str(tmp_path / "undisturbed")
    build(undisturbed, reader()).run("encode")

    for uri in (str(tmp_path / "interrupted"), f"{bucket}/interrupted"):
        with pytest.raises(Exception, match="the disk is full") as failure:
            build(uri, reader(fails_at=25)).run("encode")
        assert "Free some" in causes(failure.value)
        names = storage.list_files(uri).keys()
        assert "manifest.json" not in names
        assert {"part-00000.parquet", "part-00001.parquet"} <= names
        assert "part-00002.parquet" not in names
        # Not made again: a reader that would fail there is not even asked.
        build(uri, reader(fails_at=3)).run("encode")
        assert contents(uri) == contents(undisturbed)


def test_inputs_are_listed_once(tmp_path: Path) -> None:
    """Whoever continues works on the inputs that were there at the start."""
    uri = str(tmp_path)
    with pytest.raises(Exception, match="the disk is full"):
        build(uri, reader(fails_at=0)).run("encode")
    build(uri, reader(), pieces=lambda: iter([{"start": 100, "stop": 200}])).run("encode")
    assert keys(uri) == {str(number) for number in range(40)}


def test_broken_inputs_are_in_the_manifest_with_the_reason(tmp_path: Path) -> None:
    uri = str(tmp_path)
    made = build(uri, reader(broken=(3, 17))).run("encode")

    assert made.quarantined == tuple(Quarantined(key=k, reason="it is odd") for k in ("3", "17"))
    assert LatentManifest.load(uri) == made
    assert keys(uri) == {str(number) for number in range(40) if number not in (3, 17)}


def test_a_part_without_a_good_row_is_left_out(tmp_path: Path) -> None:
    uri = str(tmp_path)
    made = build(uri, reader(broken=tuple(range(10, 20))), max_quarantined=0.3).run("encode")
    assert [part.name for part in made.parts] == [f"part-0000{i}.parquet" for i in (0, 2, 3)]
    assert len(keys(uri)) == 30


def test_too_many_broken_inputs_are_no_set_but_the_work_is_kept(tmp_path: Path) -> None:
    uri, broken = str(tmp_path), (0, 11, 12, 33, 39)
    with pytest.raises(InvalidInputError) as refused:
        build(uri, reader(broken)).run("encode")
    assert "max_quarantined = 0.1: 5 of 40 inputs could not be read (0: it is odd; 11" in str(
        refused.value
    )
    assert "manifest.json" not in storage.list_files(uri)
    made = build(uri, reader(fails_at=1), max_quarantined=0.125).run("encode")
    assert (made.rows, len(made.quarantined)) == (35, 5)


def test_statistics_are_those_of_numpy(tmp_path: Path) -> None:
    made = build(str(tmp_path), reader()).run("encode")
    values = np.stack([np.random.default_rng(n).normal(size=4) for n in range(40)])
    stored = values.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(made.mean, stored.mean(), rtol=1e-9)
    np.testing.assert_allclose(made.std, stored.std(), rtol=1e-9)


def test_a_place_that_is_taken_is_refused_and_replaced_when_told(tmp_path: Path) -> None:
    uri = str(tmp_path)
    with pytest.raises(Exception, match="the disk is full"):
        build(uri, reader(fails_at=15)).run("encode")
    other = build(uri, reader(), sha256="two")
    with pytest.raises(InvalidInputError, match=r"another latent set .* is being made there"):
        other.finished()
    with pytest.raises(InvalidInputError, match=r"another latent set .* is being made there"):
        other.run("encode")

    assert build(uri, reader(), sha256="two", overwrite=True).finished() is None
    replaced = build(uri, reader(broken=(0,)), sha256="two", overwrite=True).run("encode")
    assert (replaced.rows, replaced.encoding_sha256) == (39, "two")
    assert build(uri, reader(), sha256="two").finished() == replaced
    with pytest.raises(InvalidInputError, match=r"another latent set .* lies there"):
        build(uri, reader()).finished()
    assert build(uri, reader(), overwrite=True).run("encode").rows == 40


def test_a_set_that_was_finished_in_the_meantime_is_not_touched(tmp_path: Path) -> None:
    uri = str(tmp_path / "set")
    late = build(uri, reader(broken=(5,)), sha256="two")
    assert late.finished() is None
    build(uri, reader()).run("encode")
    before = contents(uri)
    with pytest.raises(InvalidInputError, match=r"another latent set .* lies there by now"):
        late.run("encode")
    assert contents(uri) == before


def test_of_two_that_finish_the_second_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began on an empty folder; the manifest of the first is never replaced."""
    uri = str(tmp_path)
    late = build(uri, reader(broken=(5,)))

    first = build(str(tmp_path / "first"), reader()).run("encode")
    commit = SetBuild._commit
    monkeypatch.setattr(
        SetBuild, "_commit", lambda self, manifest: (first.save(uri), commit(self, manifest))
    )
    with pytest.raises(InvalidInputError, match=r"lies there by now|the part .* has .* bytes"):
        late.run("encode")
    assert json.loads(Path(uri, "manifest.json").read_text())["rows"] == 40


def test_given_statistics_must_be_those_of_such_rows(tmp_path: Path) -> None:
    computed = build(str(tmp_path / "computed"), reader()).run("encode")
    near = ((computed.mean[0] + 0.05,), (computed.std[0] * 1.05,))
    made = build(str(tmp_path / "near"), reader(), normalisation=near, is_of_rows=True).run("it")
    assert (made.mean, made.std) == near
    for mean, std in (((computed.mean[0] + 0.2,), computed.std), (computed.mean, (2.0,))):
        far = build(str(tmp_path / "far"), reader(), normalisation=(mean, std), is_of_rows=True)
        with pytest.raises(InvalidInputError, match=r"statistics = 'given': they differ"):
            far.run("import")
    # Those of an autoencoder or a teacher are of other rows.
    other = build(str(tmp_path / "other"), reader(), normalisation=((3.0,), (2.0,))).run("encode")
    assert (other.mean, other.std) == ((3.0,), (2.0,))
    assert other.created_by == "test, given normalisation"
    assert stats(str(tmp_path / "other")).metrics["max_relative_difference"] > 1
    for std in ((0.0,), (float("nan"),), (1.0, 1.0)):
        with pytest.raises(InvalidInputError, match=r"std = .*: not"):
            build(str(tmp_path / "odd"), reader(), normalisation=((3.0,), std)).run("encode")


def test_a_null_prompt_is_of_the_set_beside_it(tmp_path: Path) -> None:
    uri = str(tmp_path)
    one, two = (NullText(torch.full((2, 3), value), torch.ones(2)) for value in (1.0, 2.0))
    two.save(uri)
    with pytest.raises(Exception, match="the disk is full"):
        build(uri, reader(fails_at=0)).run("encode")
    assert NULL_TEXT not in storage.list_files(uri)
    build(uri, reader(null=one)).run("encode")
    content = storage.read_bytes(storage.join(uri, NULL_TEXT))
    assert content == one._content()
    # One that was finished by another program in the meantime is left alone.
    with pytest.raises(InvalidInputError, match="lies there by now"):
        build(uri, reader(null=two), sha256="two").run("encode")
    assert storage.read_bytes(storage.join(uri, NULL_TEXT)) == content
    build(uri, reader(), sha256="two", overwrite=True).run("encode")
    assert NULL_TEXT not in storage.list_files(uri)
