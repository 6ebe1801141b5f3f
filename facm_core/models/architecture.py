"""Which network an architecture is."""

from __future__ import annotations

from typing import TypeAlias

from facm_core.models.adapters import WanAdapter
from facm_core.models.experts import Experts
from facm_core.models.lightning_dit import LightningDiT, LightningDiTConfig
from facm_core.models.wan import WanConfig, build_wan

Architecture: TypeAlias = LightningDiTConfig | WanConfig
Network: TypeAlias = LightningDiT | WanAdapter | Experts


def build_network(architecture: Architecture) -> Network:
    """The velocity network, with initial weights; all but the weights is there on ``meta``, too.

    Raises:
        InvalidInputError: a Wan, and diffusers is not installed.
    """
    match architecture:
        case LightningDiTConfig():
            return LightningDiT(architecture)
        case WanConfig():
            return build_wan(architecture)
