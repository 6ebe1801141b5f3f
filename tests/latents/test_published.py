"""The published layout: in and out bit for bit, and everything that is not it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.config.sections import RunConfig
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.build import BuildersConfig
from facm_platform.latents.published import ImportConfig, export, prepare
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from facm_platform.tracking import Store

Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def tracking(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """MLflow in the test's own folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return store


def shard(rows: int, seed: int, dtype: str = "float32", text: bool = False) -> Tensors:
    random = np.random.default_rng(seed)
    latents, mirrored = random.normal(3, 2, (2, rows, 4, 2, 2)).astype(dtype)
    tensors = {"latents": latents, "latents_flip": mirrored}
    if not text:
        return tensors | {"labels": random.integers(0, 5, rows)}
    mask = (np.arange(6) < random.integers(1, 7, (rows, 1))).astype(np.uint8)
    embedding = random.normal(size=(rows, 6, 3)).astype(np.float16)
    return {"latents": latents, "text_embedding": embedding, "text_mask": mask}


def write_shards(folder: Path, **settings: Any) -> dict[str, Tensors]:
    """700 and 40 rows, so that one takes several reads."""
    folder.mkdir()
    shards = {}
    for rank, rows in enumerate((700, 40)):
        name = f"latents_rank{rank:02d}_shard000.safetensors"
        shards[name] = shard(rows, rank, **settings)
        save_file(shards[name], folder / name)
    return shards


def imported(source: str, output: str, **values: Any) -> LatentManifest:
    settings: dict[str, Any] = {"num_classes": 5, "autoencoder": "identity"}
    settings |= {"workers": BuildersConfig(count=1)}
    config = ImportConfig(
        run=RunConfig(name="import"), source_uri=source, output_uri=output, **settings | values
    )
    prepare(config).execute()
    return LatentManifest.load(output)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_there_and_back_bit_for_bit(tmp_path: Path, bucket: str, dtype: str) -> None:
    shards = write_shards(tmp_path / "source", dtype=dtype)
    source, output, back = str(tmp_path / "source"), str(tmp_path / "set"), str(tmp_path / "back")
    if dtype == "float16":
        storage.upload_folder(tmp_path / "source", f"{bucket}/source")
        source, output = f"{bucket}/source", f"{bucket}/set"
    manifest = imported(source, output)

    assert (manifest.rows, manifest.latent_shape, manifest.flip) == (740, (4, 2, 2), True)
    every = np.concatenate(
        [tensors[name] for tensors in shards.values() for name in ("latents", "latents_flip")]
    ).astype(np.float64)
    np.testing.assert_allclose(manifest.mean, every.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.std, every.std((0, 2, 3)), rtol=1e-9)

    assert export(output, back).metrics == {"rows": 740.0, "files": 2.0}
    for index, tensors in enumerate(shards.values()):
        found = load_file(Path(back, f"latents_rank00_shard{index:03d}.safetensors"))
        assert found.keys() == tensors.keys()
        for name, values in tensors.items():
            assert found[name].dtype == values.dtype
            assert found[name].tobytes() == values.tobytes()
    statistics = load_file(Path(back, "latents_stats.safetensors"))
    assert statistics["mean"].shape == (1, 4, 1, 1)
    assert tuple(statistics["std"].flatten()) == manifest.std


@pytest.mark.usefixtures("ray_cluster")
def test_rows_with_texts_reach_training_whole(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "source", text=True)
    uri = str(tmp_path / "set")
    manifest = imported(str(tmp_path / "source"), uri, num_classes=0)
    assert (manifest.num_classes, manifest.text_shape) == (0, (6, 3))

    seen = 0
    for batch in local_batches(LatentStream(uri, manifest, 0), 0, 740, 100):
        assert not isinstance(batch.condition, torch.Tensor)
        text, mask = batch.condition["text_embedding"], batch.condition["text_mask"]
        assert (text.dtype, mask.dtype) == (torch.float16, torch.bool)
        latents = manifest.denormalise(batch.latents)
        for row, key in enumerate(batch.keys):
            name, number = key.split("#")
            stored = {field: values[int(number)] for field, values in shards[name].items()}
            np.testing.assert_allclose(latents[row], stored["latents"], rtol=1e-4, atol=1e-5)
            assert np.array_equal(text[row], stored["text_embedding"])
            assert np.array_equal(mask[row], stored["text_mask"])
            seen += 1
    assert seen == 740
    export(uri, str(tmp_path / "back"))
    found = load_file(tmp_path / "back" / "latents_rank00_shard001.safetensors")
    assert found["text_mask"].tobytes() == list(shards.values())[1]["text_mask"].tobytes()


@pytest.mark.usefixtures("ray_cluster")
def test_published_statistics_are_used_when_asked_for(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "source")
    sample = next(iter(shards.values()))["latents"][:300].astype(np.float64)
    mean, std = (f(sample, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    content = {"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}
    torch.save(content, tmp_path / "source" / "latents_stats.pt")
    made = imported(str(tmp_path / "source"), str(tmp_path / "set"), statistics="given")
    assert made.mean == tuple(mean.flatten())
    assert made.std == tuple(std.flatten())


def test_statistics_that_would_run_code_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "source")
    torch.save({"mean": Path("x"), "std": 1}, tmp_path / "source" / "latents_stats.pt")
    with pytest.raises(InvalidInputError, match="not a checkpoint of tensors"):
        imported(str(tmp_path / "source"), str(tmp_path / "set"), statistics="given")


def test_what_cannot_be_exported_is_refused(tmp_path: Path, latent_set: Any) -> None:
    uri, _ = latent_set
    with pytest.raises(InvalidInputError, match=r"folder = .*: not empty"):
        export(uri, uri)
    with pytest.raises(InvalidInputError, match=r"there is no manifest.json"):
        export(str(tmp_path), str(tmp_path / "back"))

    moments = RowFormat(latent_shape=(1, 2, 2), latent_dtype="float32", moments=True, num_classes=1)
    values = np.random.default_rng(0).normal(size=(4, 2, 2, 2))
    table = moments.table({"latent": values, "label": [0] * 4, "key": list("abcd")})
    LatentManifest.of(
        moments,
        [write_part(str(tmp_path), "part-00000.parquet", [table], moments)],
        autoencoder_id="identity",
        autoencoder_sha256="",
        encoding_sha256="",
        created_by="test",
    ).save(str(tmp_path))
    with pytest.raises(InvalidInputError, match="the set stores moments"):
        export(str(tmp_path), str(tmp_path / "back"))


@pytest.mark.parametrize(
    ("change", "values", "problem"),
    [
        (None, {"num_classes": 0}, r"num_classes = 0: the shards have labels"),
        (None, {"statistics": "given"}, r"has neither of latents_stats.safetensors"),
        (None, {"statistics": "mine"}, r"statistics = 'mine': unknown choice"),
        (None, {"autoencoder": "/none"}, r"autoencoder = '/none': nothing lies there"),
        ({"latents": np.zeros((3, 4), np.float32)}, {}, r"its tensor latents is .*\[3, 4\]"),
        ({"latents": np.zeros((3, 4, 2, 2), np.int8)}, {}, r"its tensor latents is .*I8"),
        ({"latents": np.zeros((3, 4, 2, 2), np.float32)}, {}, r"it has \['latents'\], not"),
        (
            {
                "latents": np.zeros((3, 4, 2, 2), np.float32),
                "labels": np.zeros(4, np.int64),
            },
            {},
            r"labels is I64 \[4\], not int64 \[3\]",
        ),
    ],
)
def test_what_is_no_such_set_is_refused_before_a_cluster_is_started(
    tmp_path: Path, change: Tensors | None, values: dict[str, Any], problem: str
) -> None:
    write_shards(tmp_path / "source")
    if change is not None:
        save_file(change, tmp_path / "source" / "latents_rank00_shard000.safetensors")
    with pytest.raises(InvalidInputError, match=problem):
        imported(str(tmp_path / "source"), str(tmp_path / "set"), **values)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 100, (2).to_bytes(8, "little") + b"{]"]
)
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "latents_rank00_shard000.safetensors").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"shard000.safetensors.*not a safetensors file"):
        imported(str(tmp_path / "source"), str(tmp_path / "set"))


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"source_uri = .*there are no files latents_rank"):
        imported(str(tmp_path), str(tmp_path / "set"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_row_that_is_not_finite_ends_the_import(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "source")
    name = "latents_rank01_shard000.safetensors"
    shards[name]["latents"][7, 0, 0, 0] = np.nan
    save_file(shards[name], tmp_path / "source" / name)
    with pytest.raises(Exception, match=rf"{name}#7.*its latent is not finite"):
        imported(str(tmp_path / "source"), str(tmp_path / "set"))
    assert not Path(tmp_path, "set", "manifest.json").exists()
