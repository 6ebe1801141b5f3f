"""Velocity networks."""

from facm_core.models.adapters import adapt
from facm_core.models.architecture import Architecture, Network, build_network
from facm_core.models.base import Condition, VelocityModel
from facm_core.models.lightning_dit import LightningDiT, LightningDiTConfig
from facm_core.models.wan import WanConfig

__all__ = [
    "Architecture",
    "Condition",
    "LightningDiT",
    "LightningDiTConfig",
    "Network",
    "VelocityModel",
    "WanConfig",
    "adapt",
    "build_network",
]
