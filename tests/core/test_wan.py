"""Wan as an architecture: against diffusers' own network, and every configuration that is none."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from facm_core.errors import InvalidInputError
from facm_core.models import WanConfig, build_network
from facm_core.models.time_scale import slow_time
from facm_core.models.wan import wan_preset

TINY = WanConfig(
    height=4,
    width=6,
    in_channels=4,
    text_tokens=5,
    text_dim=12,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=32,
    cross_attn_norm=False,
    eps=1e-5,
    rope_max_seq_len=16,
)


def diffusers_config(**changes: Any) -> dict[str, Any]:
    """What diffusers writes of the same network; each of its values differs from the default."""
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=False,
        eps=1e-5,
        rope_max_seq_len=16,
    )
    return {**dict(network.config), "_class_name": type(network).__name__, **changes}


def test_the_configuration_is_that_of_diffusers() -> None:
    assert WanConfig.from_diffusers(diffusers_config(), height=4, width=6, text_tokens=5) == TINY
    network: Any = build_network(TINY)
    assert diffusers_config() == {
        **dict(network.network.config),
        "_class_name": "WanTransformer3DModel",
    }


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("boundary", [None, 0.5])
def test_a_network_from_meta_is_the_network(frames: int, boundary: float | None) -> None:
    """All but what its state dict holds is there, and nothing was drawn."""
    config = replace(TINY, frames=frames, boundary=boundary)
    whole: Any = build_network(config)
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        model: Any = build_network(config)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.load_state_dict(whole.state_dict(), assign=True)
    x, t = torch.randn(3, *config.latent_shape), torch.tensor([0.1, 0.6, 1.8])
    condition = {"text_embedding": torch.randn(3, 5, 12), "text_mask": torch.ones(3, 5)}
    assert x.ndim == (4 if frames == 1 else 5)
    assert torch.equal(model(x, t, condition), whole(x, t, condition))
    experts = [whole] if boundary is None else [whole.high_noise, whole.low_noise]
    assert len(experts) == config.networks
    with torch.no_grad():
        video = x.reshape(3, 4, frames, 4, 6)
        timestep, text = 1000 * (1 - t), condition["text_embedding"]
        outputs = [-e.network(video, timestep, text).sample.reshape(x.shape) for e in experts]
    for row, expert in enumerate([0, 0, 0] if boundary is None else [0, 1, 0]):
        torch.testing.assert_close(model(x, t, condition)[row], outputs[expert][row])


def test_the_null_prompt_is_part_of_the_weights() -> None:
    model: Any = build_network(replace(TINY, boundary=0.5))
    weights = model.state_dict()
    mask = torch.tensor([1.0, 1, 0, 0, 0])
    for expert in ("high_noise", "low_noise"):
        weights[f"{expert}.null_text_embedding"] = torch.arange(60.0).view(5, 12)
        weights[f"{expert}.null_text_mask"] = mask
    model.load_state_dict(weights)
    condition = {
        "text_embedding": torch.zeros(2, 5, 12, dtype=torch.float16),
        "text_mask": torch.ones(2, 5, dtype=torch.bool),
    }
    null = model.null_condition(condition)
    assert {name: value.dtype for name, value in null.items()} == {
        name: value.dtype for name, value in condition.items()
    }
    for row in (0, 1):
        assert null["text_embedding"][row].flatten().tolist() == list(range(60))
        assert null["text_mask"][row].tolist() == mask.bool().tolist()


@pytest.mark.parametrize("boundary", [None, 0.5])
def test_slow_sinusoids_are_part_of_the_architecture(boundary: float | None) -> None:
    """Names, shapes and the other weights are those of the network with all of them."""
    slow = replace(TINY, boundary=boundary, fastest=20.0)
    whole: Any = build_network(replace(slow, fastest=None))
    expected = slow_time(copy.deepcopy(whole), 20.0)
    with torch.device("meta"):
        model: Any = build_network(slow)
    model.load_state_dict(whole.state_dict(), assign=True)
    assert whole.state_dict().keys() == model.state_dict().keys()
    x, t = torch.randn(3, *slow.latent_shape), torch.tensor([0.1, 0.6, 1.8])
    condition = {"text_embedding": torch.randn(3, 5, 12), "text_mask": torch.ones(3, 5)}
    assert torch.equal(model(x, t, condition), expected(x, t, condition))
    assert not torch.equal(model(x, t, condition), whole(x, t, condition))
    with pytest.raises(InvalidInputError, match=r"fastest = 0.1: the slowest of 16"):
        build_network(replace(slow, fastest=0.1))


def test_published_sizes() -> None:
    config = wan_preset("wan-14b", height=90, width=160, boundary=0.875)
    assert config.latent_shape == (16, 90, 160)
    assert (config.text_shape, config.networks) == ((512, 4096), 2)
    assert replace(config, frames=21).latent_shape == (16, 21, 90, 160)
    with pytest.raises(InvalidInputError, match=r"preset = 'wan': .*wan-1.3b"):
        wan_preset("wan", height=4, width=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0: below 1"),
        ({"text_tokens": 0}, "text_tokens = 0: below 1"),
        ({"attention_head_dim": 7}, "attention_head_dim = 7: not an even number"),
        ({"height": 5}, r"patch_size = \(1, 2, 2\): does not divide .* \(1, 5, 6\)"),
        ({"patch_size": (2, 2)}, r"patch_size = \(2, 2\): does not divide"),
        ({"rope_max_seq_len": 2}, "rope_max_seq_len = 2: less than the 3 patches"),
        ({"eps": 0.0}, "eps = 0.0: not positive"),
        ({"fastest": 0.0}, "fastest = 0.0: not positive"),
        ({"boundary": 875.0}, r"boundary = 875.0: not in \(0, 1\). Use 0.875"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet"}, "_class_name = 'UNet': not WanTransformer3DModel"),
        ({"out_channels": 8}, "out_channels = 8: not 4: .* no network from text alone"),
        ({"image_dim": 1280}, "image_dim = 1280: not None"),
        ({"added_kv_proj_dim": 24}, "added_kv_proj_dim = 24"),
        ({"qk_norm": "layer_norm"}, "qk_norm = 'layer_norm': not rms_norm_across_heads"),
        ({"vace_layers": [0, 2]}, r"vace_layers = \[0, 2\]"),
    ],
)
def test_another_network_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        WanConfig.from_diffusers(diffusers_config(**change), height=4, width=6, text_tokens=5)


def test_a_missing_value_is_named() -> None:
    values = diffusers_config()
    del values["ffn_dim"]
    with pytest.raises(InvalidInputError, match="ffn_dim = None: missing"):
        WanConfig.from_diffusers(values, height=4, width=6, text_tokens=5)


def test_without_diffusers_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(
        InvalidInputError, match=r"not installed\. Install it: pip install diffusers"
    ):
        build_network(TINY)
