"""Tiny diffusers networks behind their adapters, for tests and for the scripts of their ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from facm_core.models.adapters import DiffusersAdapter, adapt
from facm_core.models.base import Condition

WIDTHS = {"num_attention_heads": 2, "num_layers": 3}
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "dit": lambda **changes: DiTTransformer2DModel(
        attention_head_dim=8,
        in_channels=3,
        out_channels=6,
        sample_size=4,
        num_embeds_ada_norm=5,
        **WIDTHS | changes,
    ),
    # Like 3.5: normalised queries and keys, a second attention in the first blocks.
    "sd3": lambda **changes: SD3Transformer2DModel(
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=4,
        pos_embed_max_size=6,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **WIDTHS | changes,
    ),
    "wan": lambda **changes: WanTransformer3DModel(
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=32,
        ffn_dim=48,
        rope_max_seq_len=16,
        **WIDTHS | changes,
    ),
}
PROMPT = {
    "dit": {},
    "sd3": {"text_embedding": (5, 12), "pooled_embedding": (10,)},
    "wan": {"text_embedding": (5, 12)},
}


def tiny(name: str, seed: int, **changes: int) -> DiffusersAdapter:
    """The network `name` in float64, without a weight at its zero start."""
    network = NETWORKS[name](**changes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    null = {n: torch.randn(shape, generator=generator) for n, shape in PROMPT[name].items()}
    return adapt(network, **{"null": null} if null else {}).double()


def tiny_batch(name: str, seed: int = 0, size: int = 4) -> tuple[Tensor, Tensor, Condition]:
    """x (B, C, 4, 4), t (B,) on both halves of the expanded interval, and the condition.

    The size B is a multiple of 4.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator, dtype=torch.float64)

    x = normal(3 if name == "dit" else 4, 4, 4)
    t = torch.tensor([0.1, 0.5, 0.9, 1.7], dtype=torch.float64).repeat(size // 4)
    prompt = {n: normal(*shape) for n, shape in PROMPT[name].items()}
    return x, t, prompt or torch.tensor([0, 3, 5, 2]).repeat(size // 4)
