"""Velocity networks."""

from facm_core.models.adapters import adapt
from facm_core.models.base import Condition, VelocityModel
from facm_core.models.lightning_dit import LightningDiT, LightningDiTConfig

__all__ = ["Condition", "LightningDiT", "LightningDiTConfig", "VelocityModel", "adapt"]
