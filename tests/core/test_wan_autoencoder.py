"""Wan's autoencoder on single images, beside diffusers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from facm_core.autoencoders import WanAutoencoder, load_autoencoder
from facm_core.errors import InvalidInputError
from tests.tiny_wan import wan_vae

LEVELS = {"dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
SIZES: dict[str, dict[str, Any]] = {
    "wan 2.1": LEVELS,
    "wan 2.2 5B": {
        **LEVELS,
        "decoder_base_dim": 8,
        "z_dim": 6,
        "latents_mean": [0.1 * i for i in range(6)],
        "latents_std": [1.0 + 0.1 * i for i in range(6)],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
STRIDES = {"wan 2.1": 8, "wan 2.2 5B": 16}


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, size: str) -> Path:
    """A pipeline's."""
    wan_vae(**SIZES[size]).save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def load(folder: Path) -> WanAutoencoder:
    autoencoder = load_autoencoder("wan", folder)
    assert isinstance(autoencoder, WanAutoencoder)
    return autoencoder


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_an_image_is_a_video_of_one_frame(
    folder: Path,
    size: str,
    images: Tensor,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autoencoder = load(folder).to("cpu", dtype)
    moments = autoencoder.encode(images)
    # Its own rounds to float32 where it repeats pixels.
    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", nn.Upsample.forward)
    network = AutoencoderKLWan.from_pretrained(folder / "vae").double()
    with torch.no_grad():
        posterior = network.encode(images[:, :, None].double()).latent_dist
        decoded = network.decode(posterior.mean).sample
        shrunk = network.decode(0.1 * posterior.mean).sample
    assert moments.log_variance is not None
    assert moments.mean.dtype == torch.float32
    tolerances = {"atol": tolerance, "rtol": tolerance}
    assert_close(moments.mean, posterior.mean[:, :, 0].float(), **tolerances)
    assert_close(moments.log_variance, posterior.logvar[:, :, 0].float(), **tolerances)
    for latents, expected in ((moments.mean, decoded), (0.1 * moments.mean, shrunk)):
        got = autoencoder.decode(latents)
        assert got.shape == images.shape
        assert_close(got, expected[:, :, 0].float(), **tolerances)
    if dtype == torch.float64:
        exact = autoencoder._module.decode(posterior.mean).sample
        assert_close(exact, decoded, atol=1e-12, rtol=1e-12)


def test_shapes_and_normalisation_are_those_of_its_configuration(folder: Path, size: str) -> None:
    autoencoder = load(folder / "vae")
    config = wan_vae(**SIZES[size]).config
    stride = STRIDES[size]
    shape = (config.z_dim, 64 // stride, 96 // stride)
    assert autoencoder.latent_shape((3, 64, 96)) == shape
    assert autoencoder.encode(torch.zeros(1, 3, 64, 96)).mean.shape[1:] == shape
    assert autoencoder.normalisation == (tuple(config.latents_mean), tuple(config.latents_std))
    with pytest.raises(InvalidInputError, match=f"multiples of {stride}"):
        autoencoder.latent_shape((3, 64, 96 - stride // 2))
    with pytest.raises(InvalidInputError, match="images of 3 channels"):
        autoencoder.latent_shape((4, 64, 64))


def configure(folder: Path, **fields: Any) -> None:
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("size", ["wan 2.1"], indirect=True)
def test_the_hash_is_of_what_bears_on_outputs(folder: Path) -> None:
    before = load(folder).sha256
    configure(folder, latents_mean=[1.0, 2.0, 3.0, 4.0], _diffusers_version="0")
    assert load(folder).sha256 == before
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] += 1e-3
    save_file(tensors, weights)
    assert load(folder).sha256 != before


@pytest.mark.parametrize("size", ["wan 2.1"], indirect=True)
def test_what_is_no_whole_autoencoder_is_refused(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for values in ([1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, float("inf")]):
        configure(folder, latents_std=values)
        with pytest.raises(InvalidInputError, match="latents_std of its configuration is not"):
            load(folder)
    configure(folder, latents_std=[1.0] * 4, wavelets=True)
    with pytest.raises(InvalidInputError, match="diffusers does not know wavelets"):
        load(folder)
    file = folder / "vae" / "config.json"
    fields = json.loads(file.read_text())
    del fields["wavelets"]
    file.write_text(json.dumps(fields))
    tensors = load_file(weights)
    tensors["more"] = tensors.pop("quant_conv.bias")
    save_file(tensors, weights)
    with pytest.raises(InvalidInputError, match=r"missing quant_conv\.bias; unexpected more"):
        load(folder)


@pytest.mark.parametrize("size", ["wan 2.2 5B"], indirect=True)
def test_it_computes_in_bfloat16(folder: Path, images: Tensor) -> None:
    exact = load(folder)
    rounded = exact.to("cpu", torch.bfloat16)
    mean = exact.encode(images).mean
    for got, expected in (
        (rounded.encode(images).mean, mean),
        (rounded.decode(mean), exact.decode(mean)),
    ):
        assert 1e-4 < (got - expected).norm() / expected.norm() < 0.05
    assert (rounded.sha256, rounded.normalisation) == (exact.sha256, exact.normalisation)
