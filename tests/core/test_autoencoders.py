"""Autoencoders: numbers against latent diffusion and diffusers, strictness, identity of weights."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import facm_core.autoencoder_files
from facm_core.autoencoders import KLAutoencoder, Moments, load_autoencoder
from facm_core.checkpoints import LoadReport
from facm_core.errors import InvalidInputError
from tests.core import ldm_oracle
from tests.core.ldm_oracle import TINY_SD, TINY_VA_VAE, VA_VAE, Sizes, Weights, random_weights

Save = Callable[..., Path]
Z = TINY_VA_VAE.z


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def save(content: Any, name: str = "autoencoder.pt", **options: Any) -> Path:
        if name.endswith(".safetensors"):
            save_file(content, tmp_path / name)
        else:
            torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def weights() -> Weights:
    return random_weights(TINY_VA_VAE)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As diffusers saves it; its values are those that its own initialisation draws."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        scaling_factor=0.5,
    )
    network.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def weights_of(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def load(path: Path) -> KLAutoencoder:
    autoencoder = load_autoencoder("kl", path)
    assert isinstance(autoencoder, KLAutoencoder)
    return autoencoder


# --- the interface ------------------------------------------------------------------------------


def test_identity_gives_the_pixels_back() -> None:
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    identity = load_autoencoder("identity").to("cpu", torch.bfloat16)
    moments = identity.encode(images)

    assert not identity.stochastic
    assert identity.latent_shape((1, 8, 8)) == (1, 8, 8)
    assert moments.log_variance is None
    assert torch.equal(moments.mean, images)
    assert torch.equal(moments.sample(torch.randn_like(images)), images)
    assert torch.equal(identity.decode(moments.mean), images)
    assert identity.decode(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1.0, 0.5, 1.0]


def test_a_sample_is_the_mean_and_deviations_of_noise() -> None:
    moments = Moments(mean=torch.tensor([1.0, -2.0]), log_variance=torch.tensor([4.0, 0.25]).log())
    assert_close(moments.sample(torch.tensor([3.0, -1.0])), torch.tensor([7.0, -2.5]))


def test_a_name_and_a_path_must_go_together(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"data.autoencoder = 'vae': .*Use identity, or"):
        load_autoencoder("vae", field="data.autoencoder")
    with pytest.raises(InvalidInputError, match=r"data.autoencoder_path = .*has no weights"):
        load_autoencoder("identity", tmp_path, field="data.autoencoder")
    with pytest.raises(InvalidInputError, match=r"autoencoder_path = .*nowhere.pt': no such file"):
        load_autoencoder("vae", tmp_path / "nowhere.pt")


def test_diffusers_is_asked_for_only_when_it_is_needed(
    weights: Weights, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    files = runpy.run_path(facm_core.autoencoder_files.__file__)
    with pytest.raises(InvalidInputError, match=r"a_path = .*not installed. Install diffusers"):
        files["read_ldm_file"](save(weights), "a_path")


# --- the layout of latent diffusion -------------------------------------------------------------


@pytest.mark.parametrize("sizes", [TINY_VA_VAE, TINY_SD], ids=["f16", "f8"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["32", "64"]
)
def test_latent_diffusion_computes_the_same(
    sizes: Sizes, dtype: torch.dtype, tolerance: float, images: Tensor, save: Save
) -> None:
    """In float64 the only error is the rounding of the outputs to float32."""
    weights = random_weights(sizes)
    exact = {name: value.double() for name, value in weights.items()}
    autoencoder = load(save({"state_dict": weights})).to("cpu", dtype)
    moments = autoencoder.encode(images)
    expected = ldm_oracle.encode(exact, images.double()).float()
    assert moments.log_variance is not None
    assert_close(moments.mean, expected[:, : sizes.z], atol=tolerance, rtol=tolerance)
    assert_close(moments.log_variance, expected[:, sizes.z :], atol=tolerance, rtol=tolerance)
    assert moments.mean.shape[1:] == autoencoder.latent_shape((3, 32, 48))

    decoded = ldm_oracle.decode(exact, moments.mean.double()).float()
    assert (decoded.abs() > 1).any()
    assert (decoded.abs() < 1).float().mean() > 0.5
    images = autoencoder.decode(moments.mean)
    assert_close(images, decoded.clamp(-1, 1), atol=tolerance, rtol=tolerance)


def test_the_log_variance_is_clamped(weights: Weights, images: Tensor, save: Save) -> None:
    weights["quant_conv.bias"][Z] = 1000
    weights["quant_conv.bias"][Z + 1] = -1000
    log_variance = load(save(weights)).encode(images).log_variance
    assert log_variance is not None
    assert log_variance[:, :2].mean(dim=(0, 2, 3)).tolist() == [20, -30]


def test_the_true_va_vae_converts(save: Save) -> None:
    """Every key and shape of f16d32; the file holds one zero per weight, seen in its shape."""
    shapes = ldm_oracle.shapes(VA_VAE)
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    autoencoder = load(save({"state_dict": zeros}))
    report = LoadReport(source="state_dict", loaded=len(shapes), left_in_file=())
    assert autoencoder.report == report
    assert autoencoder.latent_shape((3, 256, 256)) == (32, 16, 16)


def test_what_is_no_autoencoder_is_left_out_and_reported(weights: Weights, save: Save) -> None:
    others = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "loss.logvar": torch.zeros(()),
        "foundation_model.model.cls_token": torch.zeros(1, 1, 4),
        "linear_proj.weight": torch.zeros(4, Z, 1, 1),
        "model_ema.decay": torch.zeros(()),
    }
    content = {"state_dict": weights | others, "epoch": 50, "optimizer_states": [{"state": {}}]}
    report = load(save(content, "last.ckpt")).report
    assert (report.source, report.loaded) == ("state_dict", len(weights))
    assert report.left_in_file == tuple(sorted([*others, "epoch", "optimizer_states"]))


def lacking(weights: Weights, *names: str) -> Weights:
    return {name: value for name, value in weights.items() if name not in names}


MISFITS: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "missing": (
        lambda w: lacking(w, "decoder.up.4.attn.2.k.bias", "quant_conv.weight"),
        r"missing decoder.up.4.attn.2.k.bias; missing quant_conv.weight$",
    ),
    "missing where a size is read": (
        lambda w: lacking(w, "encoder.down.2.block.0.conv1.weight"),
        r"missing encoder.down.2.block.0.conv1.weight",
    ),
    "no attention in the decoder": (
        lambda w: {name: value for name, value in w.items() if ".up.4.attn.1." not in name},
        r"missing decoder.up.4.attn.1.norm.weight",
    ),
    "unexpected": (
        lambda w: w | {"quantize.embedding.weight": torch.zeros(3, 4)},
        r"unexpected quantize.embedding.weight$",
    ),
    "weights of an EMA": (
        lambda w: w | {"model_ema.encoderconv_inweight": torch.zeros(3)},
        r"unexpected model_ema.encoderconv_inweight$",
    ),
    "shape": (
        lambda w: w | {"encoder.mid.attn_1.q.weight": torch.zeros(128, 128, 3, 3)},
        r"encoder.mid.attn_1.q.weight has shape \(128, 128, 3, 3\), the model \(128, 128\)$",
    ),
    "one moment": (
        lambda w: w | {"encoder.conv_out.weight": torch.zeros(Z, 128, 3, 3)},
        r"quant_conv.weight has shape \(16, 16, 1, 1\), the model \(8, 8, 1, 1\)",
    ),
    "no multiple of 32": (
        lambda w: w | {"encoder.down.0.block.0.conv1.weight": torch.zeros(20, 32, 3, 3)},
        r"diffusers cannot build its configuration: num_channels .*divisible by num_groups",
    ),
    "no tensor": (lambda w: w | {"quant_conv.bias": 3}, r"no tensors: quant_conv.bias$"),
    "nothing": (lambda w: {}, r"missing encoder.conv_in.weight"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_file_that_is_no_whole_autoencoder_is_refused(
    misfit: str, weights: Weights, save: Save
) -> None:
    change, problem = MISFITS[misfit]
    path = save(change(weights))
    with pytest.raises(InvalidInputError, match=r"autoencoder_path = .*autoencoder\.pt") as caught:
        load_autoencoder("va-vae", path)
    assert re.search(problem, caught.value.problem)


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_executed(
    zipped: bool, weights: Weights, save: Save, tmp_path: Path
) -> None:
    victim = tmp_path / "executed"
    content = {"state_dict": weights, "hyper_parameters": Hostile(victim)}
    path = save(content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InvalidInputError, match="not a checkpoint of tensors"):
        load(path)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["noise.safetensors", "noise.pt", "noise.ckpt"])
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08" * 100)
    with pytest.raises(InvalidInputError, match=f"{name}': not a checkpoint of tensors"):
        load(tmp_path / name)


# --- diffusers' own layout ----------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "vae"])
def test_a_folder_computes_as_diffusers_does(
    place: str, folder: Path, images: Tensor, tmp_path: Path
) -> None:
    (tmp_path / "pipeline").mkdir()
    if place == "vae":
        folder = folder.rename(tmp_path / "pipeline" / "vae")
    network = AutoencoderKL.from_pretrained(folder)
    autoencoder = load(folder if place == "." else tmp_path / "pipeline")
    moments = autoencoder.encode(images)
    with torch.no_grad():
        posterior = network.encode(images).latent_dist
        decoded = network.decode(posterior.mean).sample
    assert moments.log_variance is not None
    assert_close(moments.mean, posterior.mean, atol=1e-6, rtol=1e-6)
    assert_close(moments.log_variance, posterior.logvar, atol=1e-6, rtol=1e-6)
    assert_close(autoencoder.decode(posterior.mean), decoded.clamp(-1, 1), atol=1e-6, rtol=1e-6)
    assert autoencoder.latent_shape((3, 32, 48)) == (4, 16, 24)


def test_the_names_of_older_attention_are_understood(folder: Path) -> None:
    now = load(folder)
    weights = load_file(weights_of(folder))
    for old, new in {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
    }.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    assert sum(".proj_attn." in name for name in weights) == 2 * (1 + 1 + 1 + 2)
    save_file(weights, weights_of(folder))
    assert load(folder).sha256 == now.sha256

    new, old = (f"decoder.mid_block.attentions.0.{name}.bias" for name in ("to_k", "key"))
    weights[new] = weights.pop(old)
    save_file(weights, weights_of(folder))
    with pytest.raises(InvalidInputError, match=f"missing {old}; unexpected {new}\\. "):
        load(folder)


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        r"saved': neither it nor its subfolder vae has a config.json",
    ),
    "no weights": (lambda folder: weights_of(folder).unlink(), r"safetensors': no such file"),
    "no object": (
        lambda folder: (folder / "config.json").write_text("[1"),
        r"config.json is no object",
    ),
    "another class": (
        lambda folder: configure(folder, _class_name="AsymmetricAutoencoderKL"),
        r"config.json describes a AsymmetricAutoencoderKL",
    ),
    "unknown fields": (
        lambda folder: configure(folder, wavelets=True, _name_or_path="sd-vae"),
        r"diffusers does not know wavelets of its configuration",
    ),
    "no such block": (
        lambda folder: configure(folder, down_block_types=["DownEncoderBlock2D", "Square"]),
        r"diffusers cannot build its configuration: Square",
    ),
    "weights of another configuration": (
        lambda folder: configure(folder, latent_channels=3),
        r"quant_conv.weight has shape \(8, 8, 1, 1\), the model \(6, 6, 1, 1\)",
    ),
    "missing and unexpected": (
        lambda folder: configure(folder, layers_per_block=2, use_quant_conv=False),
        r"missing encoder.down_blocks.0.resnets.1.norm1.weight; .*; unexpected quant_conv.weight",
    ),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_at_fault_is_refused(fault: str, folder: Path) -> None:
    change, problem = FOLDERS[fault]
    change(folder)
    with pytest.raises(InvalidInputError, match=f"^autoencoder_path = .*{problem}"):
        load_autoencoder("sd-vae", folder)


# --- the hash -----------------------------------------------------------------------------------


def test_the_hash_is_of_the_weights_and_not_of_their_file(
    weights: Weights, save: Save, tmp_path: Path
) -> None:
    autoencoder = load(save(weights))
    assert len(autoencoder.sha256) == 64
    assert load(save(weights, "same.safetensors")).sha256 == autoencoder.sha256
    wrapped = {"epoch": 1, "state_dict": dict(sorted(weights.items(), reverse=True))}
    path = save(wrapped, "legacy.ckpt", _use_new_zipfile_serialization=False)
    assert load(path).sha256 == autoencoder.sha256
    autoencoder._module.save_pretrained(tmp_path / "folder")
    configure(tmp_path / "folder", scaling_factor=3.0, _diffusers_version="0")
    assert load(tmp_path / "folder").sha256 == autoencoder.sha256


def test_the_hash_tells_weights_and_configurations_apart(
    weights: Weights, folder: Path, save: Save
) -> None:
    before = load(save(weights)).sha256
    weights["decoder.conv_out.bias"][2] += 1e-6
    assert load(save(weights)).sha256 != before

    before = load(folder).sha256
    configure(folder, act_fn="gelu")
    assert load(folder).sha256 != before


# --- use ----------------------------------------------------------------------------------------


def test_bfloat16_stays_close_and_leaves_the_original_alone(
    weights: Weights, images: Tensor, save: Save
) -> None:
    autoencoder = load(save(weights))
    exact = autoencoder.encode(images)
    rounded = autoencoder.to("cpu", torch.bfloat16)
    moments = rounded.encode(images)
    assert moments.log_variance is not None
    assert exact.log_variance is not None
    for got, expected in (
        (moments.mean, exact.mean),
        (moments.log_variance, exact.log_variance),
        (rounded.decode(exact.mean), autoencoder.decode(exact.mean)),
    ):
        assert got.dtype == torch.float32
        # Some 30 layers each round by up to 2^-8, and their errors add up like a random walk.
        assert 1e-4 < (got - expected).norm() / expected.norm() < 0.05
    assert torch.equal(autoencoder.encode(images).mean, exact.mean)
    assert (rounded.id, rounded.sha256) == ("kl", autoencoder.sha256)


def test_outputs_can_be_trained_on(weights: Weights, images: Tensor, save: Save) -> None:
    autoencoder = load(save(weights))
    assert autoencoder.stochastic
    moments = autoencoder.encode(images)
    latents = moments.sample(torch.randn_like(moments.mean))
    decoded = autoencoder.decode(latents)
    scale = torch.ones((), requires_grad=True)
    ((scale * latents).square().sum() + (scale * decoded).square().sum()).backward()
    assert scale.grad is not None
    assert_close(scale.grad, 2 * (latents.square().sum() + decoded.square().sum()))
    assert not latents.requires_grad
    assert not decoded.requires_grad


def test_images_that_cannot_be_encoded_are_refused(weights: Weights, save: Save) -> None:
    autoencoder = load(save(weights))
    with pytest.raises(InvalidInputError, match=r"\(3, 32, 40\): .*multiples of 16"):
        autoencoder.latent_shape((3, 32, 40))
    with pytest.raises(InvalidInputError, match=r"\(3, 24, 32\): .*multiples of 16"):
        autoencoder.encode(torch.zeros(1, 3, 24, 32))
    with pytest.raises(InvalidInputError, match=r"\(1, 32, 32\): .*images of 3 channels"):
        autoencoder.encode(torch.zeros(1, 1, 32, 32))
