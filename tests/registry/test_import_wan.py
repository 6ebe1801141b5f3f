"""Wan out of a diffusers folder: strictly, and bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.samplers import sample_noise
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.config import check_measure
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import Generator, latent_sampler
from facm_platform.registry.import_wan import ImportWanConfig, ImportWanPlan, prepare
from facm_platform.tracking import Store
from tests.small import write_digits
from tests.tiny_wan import rewrite, write_pipeline, write_texts

Prepare = Callable[..., ImportWanPlan]
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
PROJECTION = "proj_out.bias"


@pytest.fixture
def manifest(tmp_path: Path) -> LatentManifest:
    return write_texts(tmp_path / "set")


@pytest.fixture
def prepared(tmp_path: Path, manifest: LatentManifest, store: Store) -> Prepare:
    """``prepared(field=value)`` -> the plan of an import from ``pipeline`` and ``set``."""

    def make(**changes: Any) -> ImportWanPlan:
        run = RunConfig(name="wan", storage_uri=str(tmp_path / "runs"))
        folders: dict[str, Any] = {
            "source_uri": str(tmp_path / "pipeline"),
            "data": DataConfig(uri=str(tmp_path / "set")),
            "output_uri": str(tmp_path / "teacher"),
        }
        return prepare(ImportWanConfig(run=run, **folders | changes))

    return make


@pytest.mark.parametrize("boundary", [None, 0.875])
def test_every_tensor_is_that_of_diffusers(
    prepared: Prepare, tmp_path: Path, manifest: LatentManifest, store: Store, boundary: Any
) -> None:
    networks = write_pipeline(tmp_path / "pipeline", boundary=boundary)
    sampling = GuidanceConfig(scale=4.0, low=0.1, high=0.9)
    result = prepared(sampling=sampling).execute()
    teacher = load_artifact(str(tmp_path / "teacher"))
    null = NullText.load(str(tmp_path / "set"), manifest)
    expected = {}
    prefixes = [""] if boundary is None else ["high_noise.", "low_noise."]
    for prefix, network in zip(prefixes, networks, strict=True):
        expected |= {f"{prefix}network.{n}": t for n, t in network.state_dict().items()}
        expected[f"{prefix}null_text_embedding"] = null.text_embedding
        expected[f"{prefix}null_text_mask"] = null.text_mask
    weights = teacher.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())

    config = teacher.config
    assert (config.role, config.objective, config.conditioning) == (
        "teacher",
        "flow_matching",
        "plain",
    )
    assert config.architecture.boundary == boundary
    assert config.latent_shape == manifest.latent_shape
    assert config.guidance == sampling
    assert (config.normalisation_mean, config.normalisation_std) == (manifest.mean, manifest.std)
    assert config.latent_manifest_sha256 == manifest.sha256
    assert config.to_json()["architecture"]["kind"] == "wan"
    tags = store.client.get_run(result.run_id).data.tags
    assert tags["facm.manifest_sha256"] == manifest.sha256
    assert tags["facm.null_text_sha256"] == null.sha256
    assert tags["facm.model_sha256"] == teacher.sha256


def test_it_is_sampled_by_prompts(
    prepared: Prepare, tmp_path: Path, manifest: LatentManifest
) -> None:
    """Steps of Euler's method with the networks themselves, across the boundary, with guidance."""
    high, low = (n.double() for n in write_pipeline(tmp_path / "pipeline", boundary=0.5))
    prepared(sampling=GuidanceConfig(scale=3.0)).execute()
    teacher = load_artifact(str(tmp_path / "teacher"))
    (batch,) = local_batches(LatentStream(str(tmp_path / "set"), manifest, 0), 0, 3, 3)
    condition: Any = batch.condition
    text = condition["text_embedding"].double() * condition["text_mask"][..., None]
    null = NullText.load(str(tmp_path / "set"), manifest)
    without = (null.text_embedding.half().double() * null.text_mask[:, None]).expand_as(text)
    x = sample_noise(manifest.latent_shape, [4, 5, 6]).double()[:, :, None]
    with torch.no_grad():
        for sigma in (1.0, 0.75, 0.5, 0.25):
            network, timestep = high if sigma >= 0.5 else low, torch.full((3,), 1000 * sigma)
            guided, unguided = (network(x, timestep, t).sample for t in (text, without))
            x = x - 0.25 * (unguided + 3 * (guided - unguided))
    got = latent_sampler(teacher, torch.device("cpu"), torch.float64)([4, 5, 6], condition, 4)
    expected = manifest.denormalise(x[:, :, 0]).double()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_without_a_text_encoder_it_takes_no_prompts(
    prepared: Prepare, tmp_path: Path, manifest: LatentManifest
) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    prepared().execute()
    with pytest.raises(InvalidInputError, match=r"artifact = .*teacher': it reads texts"):
        Generator.load(str(tmp_path / "teacher"))
    extractor: Any = None
    with pytest.raises(InvalidInputError, match=r"label_policy = 'random': .* have texts"):
        check_measure(100, extractor, manifest, "random")


def test_every_wrong_tensor_is_listed(prepared: Prepare, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=0.875)
    folder = tmp_path / "pipeline" / "transformer_2"
    names = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    file = folder / names["weight_map"][PROJECTION]
    more = {PROJECTION: None, "more": torch.ones(2), "proj_out.weight": torch.ones(3, 3)}
    rewrite(file, more)
    save_file({"more": torch.ones(2)}, folder / "z.safetensors")
    with pytest.raises(InvalidInputError) as caught:
        prepared()
    for finding in (
        "missing low_noise.network.proj_out.bias",
        "unexpected low_noise.network.more",
        "low_noise.network.more is in two files",
        "low_noise.network.proj_out.weight is (3, 3), not (16, 24)",
    ):
        assert finding in caught.value.problem
    assert "high_noise" not in caught.value.problem
    (folder / "z.safetensors").write_bytes(b"no")
    with pytest.raises(InvalidInputError, match=r"z.safetensors cannot be read"):
        prepared()


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_folder_that_is_no_wan(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"source_uri = .*model_index.json': not readable"):
        prepared()
    write_pipeline(tmp_path / "pipeline", boundary=0.875)
    index = tmp_path / "pipeline" / "model_index.json"
    change(index, boundary_ratio=None)
    with pytest.raises(InvalidInputError, match="boundary_ratio = None, and there is a transf"):
        prepared()
    change(index, boundary_ratio=0.875)
    config = tmp_path / "pipeline" / "transformer_2" / "config.json"
    change(config, eps=1e-3)
    with pytest.raises(InvalidInputError, match="its two networks are not of one size"):
        prepared()
    change(config, image_dim=1280)
    with pytest.raises(InvalidInputError, match=r"image_dim = 1280.*no network from text alone"):
        prepared()
    change(config, image_dim=None, in_channels=8, out_channels=8)
    with pytest.raises(InvalidInputError, match=r"has 8 channels of a latent, data.uri 4"):
        prepared()
    change(config, in_channels=4, out_channels=4, text_dim=7)
    with pytest.raises(InvalidInputError, match=r"has 7 features of a text, data.uri 12"):
        prepared()


def test_a_latent_set_that_does_not_belong_to_it(
    prepared: Prepare, tmp_path: Path, manifest: LatentManifest
) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    vae = tmp_path / "pipeline" / "vae" / "config.json"
    vae.parent.mkdir()
    vae.write_text(json.dumps({"latents_mean": manifest.mean, "latents_std": manifest.std}))
    prepared()
    change(vae, latents_std=[1.0, 1.0, 1.0, 1.0])
    with pytest.raises(InvalidInputError, match=r"the std of the set; .*\[1.0, 1.0, 1.0, 1.0\]"):
        prepared()
    vae.unlink()
    write_digits(tmp_path / "digits", rows=20)
    with pytest.raises(InvalidInputError, match=r"its rows have labels"):
        prepared(data=DataConfig(uri=str(tmp_path / "digits")))
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "file").touch()
    with pytest.raises(InvalidInputError, match=r"output_uri = .*: it is not empty"):
        prepared()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_mask": None}, r"it holds \{'text_embedding': \(5, 12\)\}, not"),
        ({"text_mask": torch.ones(4)}, r"'text_mask': \(4,\)"),
        ({"text_mask": torch.full((5,), 2)}, "text_mask holds more than 0 and 1"),
        ({"text_embedding": torch.full((5, 12), float("nan"))}, "text_embedding is not finite"),
    ],
)
def test_a_null_prompt_of_another_set(
    prepared: Prepare, tmp_path: Path, tensors: Any, message: str
) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    rewrite(tmp_path / "set" / NULL_TEXT, tensors)
    with pytest.raises(InvalidInputError, match=message):
        prepared()


def test_a_missing_or_damaged_null_prompt(prepared: Prepare, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    (tmp_path / "set" / NULL_TEXT).write_bytes(b"no")
    with pytest.raises(InvalidInputError, match=rf"{NULL_TEXT}': not readable"):
        prepared()
    (tmp_path / "set" / NULL_TEXT).unlink()
    with pytest.raises(InvalidInputError, match=r"no null prompt: there is no .* NullText\.save"):
        prepared()
