"""Encoding the handwritten digits: the same bytes every time, on a folder and an object store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.config import load_config
from facm_platform.config.sections import RunConfig
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.latents.encode import EncodeConfig, prepare
from facm_platform.latents.images import image_source
from facm_platform.latents.stream import read
from facm_platform.latents.tables import labels_of, latents_of
from facm_platform.tracking import Store

RUN = RunConfig(name="encode")
SMALL: dict[str, Any] = {"part_rows": 700, "batch_size": 100}


@pytest.fixture
def set_folder(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def tracking(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """MLflow in the test's own folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return store


def encode(uri: str, **values: Any) -> LatentManifest:
    config = EncodeConfig(run=RUN, output_uri=uri, **SMALL | values)
    result = prepare(config).execute()
    assert result.artifact_uri == uri
    assert result.metrics["rows"] == 1797
    return LatentManifest.load(uri)


def test_the_digits_are_those_of_scikit_learn() -> None:
    source = image_source("digits")
    batches = list(source.batches(3, 1797, 500))
    images = np.concatenate([batch.images for batch in batches])
    expected, labels = load_digits(return_X_y=True)

    assert [len(batch.keys) for batch in batches] == [500, 500, 500, 294]
    assert np.array_equal((images.reshape(-1, 64) + 1) * 8, expected[3:])
    assert (images.min(), images.max(), images.dtype) == (-1.0, 1.0, np.float32)
    assert np.concatenate([batch.labels for batch in batches]).tolist() == labels[3:].tolist()
    assert batches[0].keys[:2] == ["digits/00003", "digits/00004"]


@pytest.mark.usefixtures("ray_cluster")
def test_encoding_twice_gives_the_same_bytes_everywhere(
    tmp_path: Path, bucket: str, tracking: Store
) -> None:
    here = encode(str(tmp_path / "one"))
    again = encode(str(tmp_path / "two"), batch_size=33)
    there = encode(f"{bucket}/digits")

    runs = tracking.client.search_runs([tracking.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert {run.data.tags["facm.manifest_sha256"] for run in runs} == {here.sha256}
    assert here == again == there
    assert here.sha256 == again.sha256 == there.sha256
    assert [part.rows for part in here.parts] == [700, 700, 397]
    for part in here.parts:
        content = Path(tmp_path, "one", part.name).read_bytes()
        assert storage.read_bytes(f"{bucket}/digits/{part.name}") == content


@pytest.mark.usefixtures("ray_cluster")
def test_the_set_holds_every_digit_once_with_its_statistics(set_folder: Path) -> None:
    manifest = encode(str(set_folder))
    pixels, labels = load_digits(return_X_y=True)
    scaled = pixels / 8 - 1

    assert (manifest.latent_shape, manifest.num_classes) == ((1, 8, 8), 10)
    np.testing.assert_allclose(manifest.mean, [scaled.mean()], rtol=1e-12)
    np.testing.assert_allclose(manifest.std, [scaled.std()], rtol=1e-12)

    stream = LatentStream(str(set_folder), manifest, seed=0, lanes=1)
    (table,) = (table for task in stream.tasks(0, 0, 1797) for table in read(task))
    index = [int(key.removeprefix("digits/")) for key in table.column("key").to_pylist()]
    assert sorted(index) == list(range(1797))
    assert np.array_equal(latents_of(table).reshape(-1, 64), scaled[index])
    assert np.array_equal(labels_of(table), labels[index])


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_that_is_there_is_left_and_another_only_replaced_when_told(set_folder: Path) -> None:
    uri = str(set_folder)
    first = encode(uri)
    written = {file.name: file.stat().st_mtime_ns for file in set_folder.iterdir()}

    plan = prepare(EncodeConfig(run=RUN, output_uri=uri, **SMALL))
    assert "nothing to do" in plan.describe()
    assert encode(uri) == first
    assert {file.name: file.stat().st_mtime_ns for file in set_folder.iterdir()} == written

    with pytest.raises(InvalidInputError, match=r"another latent set lies there.*overwrite=true"):
        prepare(EncodeConfig(run=RUN, output_uri=uri, latent_dtype="float16"))
    replaced = encode(uri, latent_dtype="float16", part_rows=5000, overwrite=True)
    assert (replaced.latent_dtype, len(replaced.parts)) == ("float16", 1)
    # Pixels of 0 to 16 are exact in half precision.
    assert (replaced.mean, replaced.std) == (pytest.approx(first.mean), pytest.approx(first.std))
    assert sorted(storage.list_files(uri)) == ["manifest.json", "part-00000.parquet"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_an_interrupted_encoding_left_is_cleared(set_folder: Path) -> None:
    (set_folder / "part-00009.parquet").write_bytes(b"half")
    encode(str(set_folder))
    assert "part-00009.parquet" not in storage.list_files(str(set_folder))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part-00000-17f2.snappy.parquet").write_bytes(b"precious")
    for overwrite in (False, True):
        with pytest.raises(InvalidInputError, match=r"files of something else \(part-00000-17f2"):
            prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path), overwrite=overwrite))


def test_a_damaged_set_is_refused_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"output_uri = .*not JSON"):
        prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path)))
    prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path), overwrite=True))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["output_uri=x", "run.name=a/b"], r"run.name = 'a/b': not usable"),
        (["output_uri=x", "source=cats"], r"source = 'cats': .*Use one of digits"),
        (["output_uri=x", "autoencoder=vae"], r"autoencoder = 'vae': .*Use one of identity"),
        (["output_uri=x", "part_rows=0"], "part_rows = 0: not positive"),
        (["output_uri=x", "batch_size=-1"], "batch_size = -1: not positive"),
        (["output_uri=x", "latent_dtype=int8"], "latent_dtype = 'int8': unknown choice"),
        (["output_uri=gs://x"], "output_uri = 'gs://x': not an address"),
        (["outputuri=x"], "did you mean 'output_uri'"),
    ],
)
def test_bad_input_is_refused_before_a_cluster_is_started(
    overrides: list[str], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        prepare(load_config(EncodeConfig, None, ["run.name=encode", *overrides]))


def test_what_must_be_given() -> None:
    with pytest.raises(InvalidInputError, match=r"output_uri = '': no value was given"):
        load_config(EncodeConfig, None, ["run.name=encode"])


def test_a_bucket_that_does_not_exist_is_refused(object_store: None) -> None:
    with pytest.raises(InvalidInputError, match=r"output_uri = 's3://no-such.*does not exist"):
        prepare(EncodeConfig(run=RUN, output_uri="s3://no-such-bucket/set"))
