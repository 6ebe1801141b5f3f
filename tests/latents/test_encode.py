"""Encoding the handwritten digits: the same bytes every time, on a folder and an object store."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.config import load_config
from facm_platform.config.sections import RunConfig
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.build import BuildersConfig, SetBuild
from facm_platform.latents.encode import EncodeConfig, prepare
from facm_platform.latents.images import ImagesConfig
from facm_platform.latents.images.pixels import decode
from facm_platform.latents.stream import read
from facm_platform.latents.tables import values_of
from facm_platform.tracking import Store
from tests.tiny_wan import MEAN, STD, wan_vae

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


@pytest.mark.usefixtures("ray_cluster")
def test_encoding_twice_gives_the_same_bytes_everywhere(
    tmp_path: Path, bucket: str, tracking: Store
) -> None:
    here = encode(str(tmp_path / "one"))
    again = encode(str(tmp_path / "two"))
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

    stream = LatentStream(str(set_folder), manifest, seed=0)
    (table,) = (table for task in stream.tasks(0, 1797) for table in read(task))
    index = [int(key.removeprefix("digits/")) for key in table.column("key").to_pylist()]
    assert sorted(index) == list(range(1797))
    assert np.array_equal(values_of(table, "latent").reshape(-1, 64), scaled[index])
    assert np.array_equal(values_of(table, "label"), labels[index])


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_that_is_there_is_left_and_another_only_replaced_when_told(set_folder: Path) -> None:
    uri = str(set_folder)
    first = encode(uri)
    written = {file.name: file.stat().st_mtime_ns for file in set_folder.iterdir()}

    plan = prepare(EncodeConfig(run=RUN, output_uri=uri, **SMALL))
    assert "nothing to do" in plan.describe()
    assert encode(uri) == first
    assert {file.name: file.stat().st_mtime_ns for file in set_folder.iterdir()} == written

    with pytest.raises(InvalidInputError, match=r"another latent set .* lies there.*overwrite"):
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


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random autoencoder: (3, 16, 16) images to (4, 8, 8) latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images of 20 x 18 noise, and two files that are no images."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(20):
        file = folder / ("cat", "dog")[index // 10] / f"{index:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (18, 20, 3), np.uint8)).save(file)
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "dog" / "text.jpg").write_bytes(b"no image")
    return folder


def encode_photos(uri: str, photos: Path, vae: Path, **values: Any) -> LatentManifest:
    source = ImagesConfig(kind="folder", uri=str(photos), size=16)
    settings = {"source": source, "autoencoder": str(vae), "part_rows": 8, "batch_size": 3}
    settings |= {"max_quarantined": 0.1, "workers": BuildersConfig(count=1)}
    prepare(EncodeConfig(run=RUN, output_uri=uri, **settings | values)).execute()
    return LatentManifest.load(uri)


def stored_rows(uri: str, manifest: LatentManifest) -> dict[str, dict[str, np.ndarray]]:
    tables = [pq.read_table(Path(uri, part.name)) for part in manifest.parts]
    return {
        key: {name: values_of(table, name)[row] for name in table.column_names if name != "key"}
        for table in tables
        for row, key in enumerate(table.column("key").to_pylist())
    }


def expected_moments(photos: Path, vae: Path, key: str, mirrored: bool) -> tuple[Any, Any]:
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae).eval()
    image = decode((photos / key).read_bytes(), 16)
    image = image[:, :, ::-1].copy() if mirrored else image
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(image)[None]).latent_dist
    return posterior.mean[0].numpy(), posterior.logvar[0].numpy()


@pytest.mark.usefixtures("ray_cluster")
def test_images_to_moments_of_both_sides(tmp_path: Path, photos: Path, vae: Path) -> None:
    uri = str(tmp_path / "set")
    manifest = encode_photos(uri, photos, vae, stored="moments", flip=True)
    rows = stored_rows(uri, manifest)

    assert (manifest.latent_shape, manifest.class_names) == ((4, 8, 8), ("cat", "dog"))
    assert (manifest.rows, len(manifest.parts)) == (20, 3)
    assert {entry.key: entry.reason for entry in manifest.quarantined} == {
        "cat/empty.png": "empty",
        "dog/text.jpg": "not an image of a known format",
    }
    assert sorted(rows) == sorted(p.relative_to(photos).as_posix() for p in photos.glob("*/??.png"))
    assert all(row["label"] == key.startswith("dog") for key, row in rows.items())
    for key in ("cat/03.png", "dog/17.png"):
        for column, mirrored in (("latent", False), ("latent_flip", True)):
            expected = np.concatenate(expected_moments(photos, vae, key, mirrored))
            np.testing.assert_allclose(rows[key][column], expected, atol=1e-5)
    both = np.stack([row[c] for row in rows.values() for c in ("latent", "latent_flip")])
    mean, log_variance = np.split(both.astype(np.float64), 2, axis=1)
    variance = mean.var((0, 2, 3)) + np.exp(log_variance).mean((0, 2, 3))
    np.testing.assert_allclose(manifest.mean, mean.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.std, np.sqrt(variance), rtol=1e-9)

    # What training sees: draws that are normalised, another one in each epoch.
    batches = local_batches(LatentStream(uri, manifest, 0), 0, 200 * 20, 20)
    seen = [dict(zip(batch.keys, batch.latents, strict=True)) for batch in batches]
    assert not torch.equal(seen[0]["cat/03.png"], seen[1]["cat/03.png"])
    drawn = torch.stack([latent for epoch in seen for latent in epoch.values()])
    assert drawn.shape[1:] == (4, 8, 8)
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.02
    of_one = manifest.denormalise(torch.stack([epoch["cat/03.png"] for epoch in seen]))
    sides = [expected_moments(photos, vae, "cat/03.png", side)[0] for side in (False, True)]
    spread = np.exp(expected_moments(photos, vae, "cat/03.png", False)[1] / 2).mean()
    np.testing.assert_allclose(of_one.mean(0), sum(sides) / 2, atol=5 * spread / np.sqrt(200) + 0.1)


@pytest.mark.usefixtures("ray_cluster")
def test_samples_depend_on_their_key_and_the_seed_alone(
    tmp_path: Path, photos: Path, vae: Path
) -> None:
    rows = {}
    for name, changes in (
        ("one", {}),
        ("otherwise", {"part_rows": 5, "batch_size": 4}),
        ("seed", {"seed": 1}),
    ):
        uri = str(tmp_path / name)
        rows[name] = stored_rows(uri, encode_photos(uri, photos, vae, **changes))
    for key, row in rows["one"].items():
        np.testing.assert_allclose(rows["otherwise"][key]["latent"], row["latent"], atol=1e-5)
        assert np.abs(rows["seed"][key]["latent"] - row["latent"]).max() > 0.1
    noise = []
    for key, row in rows["one"].items():
        mean, log_variance = expected_moments(photos, vae, key, False)
        noise.append((row["latent"] - mean) / np.exp(log_variance / 2))
    assert abs(np.mean(noise)) < 4 / np.sqrt(np.size(noise))
    assert abs(np.std(noise) - 1) < 4 / np.sqrt(2 * np.size(noise))
    assert np.abs(np.corrcoef(np.reshape(noise, (20, -1))) - np.eye(20)).max() < 0.4


def test_wan_s_autoencoder_brings_its_normalisation(tmp_path: Path, photos: Path) -> None:
    """No autoencoder else has one: their latents are normalised by their own statistics."""

    def planned(**changes: Any) -> SetBuild:
        wan_vae(**changes).save_pretrained(tmp_path / "vae")
        source = ImagesConfig(kind="folder", uri=str(photos), size=16)
        values = {"source": source, "autoencoder": str(tmp_path / "vae")}
        return prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path / "set"), **values)).build

    build = planned()
    assert build.format.latent_shape == (4, 8, 8)
    assert (build.normalisation, build.is_of_rows) == ((MEAN, STD), False)
    other = planned(latents_mean=[0.0, 0.0, 0.0, 0.0])
    assert other.manifest["autoencoder_sha256"] == build.manifest["autoencoder_sha256"]
    assert other.sha256 != build.sha256
    digits = prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path / "digits")))
    assert digits.build.normalisation is None


def test_moments_need_an_autoencoder_that_has_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"stored = 'moments': .*identity has no log-var"):
        prepare(EncodeConfig(run=RUN, output_uri=str(tmp_path), stored="moments"))


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
        (["output_uri=x", "source.kind=cats"], r"source.kind = 'cats': .*Use one of digits"),
        (["output_uri=x", "autoencoder=vae"], r"autoencoder = 'vae': nothing lies there"),
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
