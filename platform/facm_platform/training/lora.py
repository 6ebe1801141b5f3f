"""Students that are a teacher's frozen weights and low-rank adapters (LoRA, arXiv 2106.09685).

peft adds the adapters: W x becomes W x + (alpha / rank) · B A x, and B is zero at first. What the
outside sees of such a student, its artefact, has the network's own names and merged weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from facm_core.errors import InvalidInputError, require
from facm_core.models import Architecture, LightningDiTConfig, WanConfig, build_network
from facm_platform.training.config import LoraConfig
from facm_platform.training.loading import parameters_on_meta
from facm_platform.training.parallel import whole

_TARGETS: dict[type[Architecture], tuple[str, ...]] = {
    LightningDiTConfig: ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3"),
    WanConfig: ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
}
"""Attention and MLP of every block."""

_BASE = ".base_layer."


def check_lora(lora: LoraConfig, architecture: Architecture) -> None:
    """Raise `InvalidInputError` unless peft is there, and every target is a linear layer's name."""
    _peft()
    with torch.device("meta"):
        modules = dict(build_network(architecture).named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    # Those of a block are in every block.
    there = sorted({re.sub(r".*blocks\.\d+\.", "", name) for name in linear})
    remedy = f"Use names, or ends of names after a dot, of {', '.join(there)}"
    for target in _targets(lora, architecture):
        # As peft understands them.
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        others = [name for name in found if name not in linear]
        require(bool(found), "lora.targets", target, "no layer has a name that ends so", remedy)
        problem = f"{', '.join(others[:3])} is no linear layer"
        require(not others, "lora.targets", target, problem, remedy)


def add_adapters(network: nn.Module, lora: LoraConfig, architecture: Architecture) -> None:
    """Freeze `network`, of that architecture, and put adapters into it, which are to be trained."""
    peft = _peft()
    targets = list(_targets(lora, architecture))
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    peft.inject_adapter_in_model(config, network.requires_grad_(False))


def add_adapters_on_meta(
    network: nn.Module, lora: LoraConfig, architecture: Architecture
) -> dict[str, Tensor]:
    """`add_adapters` to a network without storage.

    Returns:
        The adapters' initial values, whole, by name: drawn as in a network that has storage.
    """
    stand_in = copy.deepcopy(network)
    # Adapters are made where their layer is: on the CPU, where one number stands for all of it.
    stand_in._apply(lambda t: torch.zeros(()).expand(t.shape) if t.is_meta else t)
    add_adapters(stand_in, lora, architecture)
    with parameters_on_meta():
        add_adapters(network, lora, architecture)
    return {n: p.detach() for n, p in stand_in.named_parameters() if p.requires_grad}


def base_names(network: nn.Module) -> dict[str, str]:
    """The network's own name of each tensor that is no adapter's -> its name among adapters."""
    return {_plain(name): name for name in network.state_dict() if not _is_adapter(name)}


def merged(tensors: Mapping[str, Tensor], lora: LoraConfig | None) -> Iterator[tuple[str, Tensor]]:
    """The network's own names, and its tensors in one piece with their adapters added.

    A collective of those that hold shards: all must take every one, which is made when asked for.

    Args:
        tensors: State of a student.
        lora: None where it has no adapters.
    """
    for name, tensor in tensors.items():
        if _is_adapter(name):
            continue
        weight, (layer, _, kind) = whole(tensor).detach(), name.rpartition(_BASE)
        if lora is not None and layer and kind == "weight":
            a, b = (whole(tensors[f"{layer}.lora_{x}.default.weight"]).detach() for x in "AB")
            weight = weight + b @ a * (lora.alpha / lora.rank)
        yield _plain(name), weight


def _targets(lora: LoraConfig, architecture: Architecture) -> tuple[str, ...]:
    return lora.targets or _TARGETS[type(architecture)]


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    return name.replace(_BASE, ".")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InvalidInputError(
            "lora",
            "given",
            "adapters are those of peft, which is not installed",
            "Install it: pip install peft",
        ) from error
    return cast(Any, peft)
