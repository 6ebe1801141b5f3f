"""Wan out of a diffusers folder: strictly, and bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig, guided_velocity
from facm_core.samplers import sample_noise
from facm_platform.config.sections import RunConfig
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.null_text import NullText
from facm_platform.latents.text_encoder import open_text_encoder
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import latent_sampler
from facm_platform.registry.import_wan import ImportWanConfig, ImportWanPlan, prepare
from facm_platform.tracking import Store
from tests.tiny_wan import (
    FLOW_SHIFT,
    MEAN,
    SHAPE,
    SIDE,
    STD,
    TEXT,
    rewrite,
    write_pipeline,
)

Prepare = Callable[..., ImportWanPlan]
SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"
PROJECTION = "proj_out.bias"
BOUNDARY = 0.7


@pytest.fixture
def prepared(tmp_path: Path, store: Store) -> Prepare:
    """``prepared(field=value)`` -> the plan of an import from ``pipeline``."""

    def make(**changes: Any) -> ImportWanPlan:
        run = RunConfig(name="wan", storage_uri=str(tmp_path / "runs"))
        values: dict[str, Any] = {
            "source_uri": str(tmp_path / "pipeline"),
            "height": SIDE,
            "width": SIDE,
            "tokens": TEXT[0],
            "output_uri": str(tmp_path / "teacher"),
        }
        return prepare(ImportWanConfig(run=run, **values | changes))

    return make


@pytest.mark.parametrize("boundary", [None, 0.875])
def test_every_tensor_is_that_of_diffusers(
    prepared: Prepare, tmp_path: Path, store: Store, boundary: Any
) -> None:
    networks = write_pipeline(tmp_path / "pipeline", boundary=boundary)
    sampling = GuidanceConfig(scale=4.0, low=0.1, high=0.9)
    result = prepared(sampling=sampling).execute()
    teacher = load_artifact(str(tmp_path / "teacher"))
    encoder = open_text_encoder(str(tmp_path / "pipeline"), TEXT[0])
    null = NullText.of(encoder)
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
    assert config.latent_shape == SHAPE
    assert config.guidance == sampling
    assert config.shift == 1 / FLOW_SHIFT
    assert (config.normalisation_mean, config.normalisation_std) == (MEAN, STD)
    assert config.latent_manifest_sha256 is None
    assert (config.text_encoder_id, config.text_encoder_sha256) == (encoder.id, encoder.sha256)
    autoencoder = open_autoencoder(config.autoencoder_id, config.autoencoder_sha256)
    assert autoencoder.id == str(tmp_path / "pipeline" / "vae")
    assert config.to_json()["architecture"]["kind"] == "wan"
    tags = store.client.get_run(result.run_id).data.tags
    assert tags["facm.autoencoder_sha256"] == autoencoder.sha256
    assert tags["facm.text_encoder_sha256"] == encoder.sha256
    assert tags["facm.null_text_sha256"] == null.sha256
    assert tags["facm.model_sha256"] == teacher.sha256


def test_it_is_sampled_by_prompts(prepared: Prepare, tmp_path: Path) -> None:
    """Steps of Euler's method with the networks themselves, across the boundary, with guidance;
    noise levels are shifted as in the pipeline."""
    high, low = (n.double() for n in write_pipeline(tmp_path / "pipeline", boundary=BOUNDARY))
    prepared(sampling=GuidanceConfig(scale=3.0)).execute()
    teacher = load_artifact(str(tmp_path / "teacher"))
    encoder = open_text_encoder(str(tmp_path / "pipeline"), TEXT[0])
    condition = encoder.encode(["one", "two", "a digit"])._asdict()
    text, without = (encoder.encode(p)[0].double() for p in (["one", "two", "a digit"], [""] * 3))
    x = sample_noise(SHAPE, [4, 5, 6]).double()[:, :, None]
    even = torch.linspace(1, 0, 5, dtype=torch.float64)
    sigmas = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            network, timestep = high if sigma >= BOUNDARY else low, 1000 * sigma.expand(3)
            guided, unguided = (network(x, timestep, t).sample for t in (text, without))
            x = x - (sigma - following) * (unguided + 3 * (guided - unguided))
    got = latent_sampler(teacher, torch.device("cpu"), torch.float64)([4, 5, 6], condition, 4)
    mean, std = (torch.tensor(values).double().view(4, 1, 1) for values in (MEAN, STD))
    expected = x[:, :, 0] * std + mean
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class EvenSteps(FlowMatchEulerDiscreteScheduler):
    """Diffusers' own steps at our noise levels, which are even before the shift, and its are not
    quite."""

    def set_timesteps(self, steps: int, device: Any) -> None:
        super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)


@pytest.mark.parametrize("steps", [4, 7])
def test_it_takes_the_steps_of_diffusers_own_pipeline(
    prepared: Prepare, tmp_path: Path, steps: int
) -> None:
    """From prompts to latents, guided, across the boundary: at our noise levels and at its own."""
    write_pipeline(tmp_path / "pipeline", boundary=BOUNDARY)
    side = 16  # it draws multiples of this only
    prepared(sampling=GuidanceConfig(scale=3.0), height=side, width=side).execute()
    teacher = load_artifact(str(tmp_path / "teacher"))
    prompts, seeds = ["one", "two", "a digit"], [4, 5, 6]
    condition = open_text_encoder(str(tmp_path / "pipeline"), TEXT[0]).encode(prompts)._asdict()
    noise = sample_noise(teacher.config.latent_shape, seeds)
    pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)

    def theirs(scheduler: FlowMatchEulerDiscreteScheduler) -> torch.Tensor:
        pipeline.scheduler = scheduler
        (latents,) = pipeline(
            prompts,
            height=side,
            width=side,
            num_frames=1,
            num_inference_steps=steps,
            guidance_scale=3.0,
            latents=noise[:, :, None],
            max_sequence_length=TEXT[0],
            output_type="latent",
            return_dict=False,
        )
        sigmas = scheduler.sigmas[:-1]
        assert {bool(sigma >= BOUNDARY) for sigma in sigmas} == {True, False}
        return latents[:, :, 0]

    mean, std = (torch.tensor(values).view(4, 1, 1) for values in (MEAN, STD))
    expected = theirs(EvenSteps(shift=FLOW_SHIFT)) * std + mean
    got = latent_sampler(teacher, torch.device("cpu"), torch.float32)(seeds, condition, steps)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    expected, got = theirs(scheduler := FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)), noise
    with torch.no_grad():
        for sigma, following in pairwise(scheduler.sigmas):
            t = (1 - sigma).expand(3)
            velocity = guided_velocity(teacher.model, got, t, condition, 3.0, torch.ones(3) > 0)
            got = got + (sigma - following) * velocity
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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
    with pytest.raises(InvalidInputError, match=r"has 8 channels of a latent, .*vae 4"):
        prepared()
    change(config, in_channels=4, out_channels=4, text_dim=7)
    with pytest.raises(InvalidInputError, match=r"has 7 features of a text, .*text_encoder 12"):
        prepared()


def test_parts_of_a_pipeline_that_do_not_fit(prepared: Prepare, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "file").touch()
    with pytest.raises(InvalidInputError, match=r"output_uri = .*: it is not empty"):
        prepared()
    (tmp_path / "teacher" / "file").unlink()
    scheduler = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    change(scheduler, flow_shift=0)
    with pytest.raises(InvalidInputError, match=r"source_uri = .*its shift is 0, not a positive"):
        prepared()
    scheduler.write_text(json.dumps({"shift": 5.0}))
    assert prepared().shift == 0.2
    scheduler.write_text("{}")
    assert prepared().shift == 1.0
    vae = tmp_path / "pipeline" / "vae" / "config.json"
    change(vae, latents_std=[1.0])
    with pytest.raises(InvalidInputError, match=r"source_uri = .*vae': latents_std of its config"):
        prepared()
    vae.unlink()
    with pytest.raises(InvalidInputError, match=r"source_uri = .*vae': .*has a config.json"):
        prepared()
    (tmp_path / "pipeline" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"source_uri = .*text_encoder': there is no conf"):
        prepared()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"height": 10}, r"height = 10: not a multiple of 4, .*Use e\.g\. 12"),
        ({"width": 9}, r"width = 9: not a multiple of 4, .*Use e\.g\. 12"),
        ({"width": 0}, "width = 0: below 1"),
        ({"tokens": 0}, "tokens = 0: below 1"),
        ({"frames": 4}, "frames = 4: the first frame is a latent one"),
    ],
)
def test_sizes_that_do_not_fit(
    prepared: Prepare, tmp_path: Path, changes: dict[str, int], problem: str
) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    with pytest.raises(InvalidInputError, match=problem):
        prepared(**changes)


def test_videos_and_images_of_any_size(prepared: Prepare, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    assert prepared(frames=9, width=16).architecture.latent_shape == (4, 3, 4, 8)
    assert prepared(tokens=7).architecture.text_shape == (7, 12)
