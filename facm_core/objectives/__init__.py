"""Training objectives, one file per paper."""

from facm_core.objectives.base import Draws, Objective, ObjectiveOutput
from facm_core.objectives.facm import FACM, FACMConfig
from facm_core.objectives.flow_matching import FlowMatching, FlowMatchingConfig

__all__ = [
    "FACM",
    "Draws",
    "FACMConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "Objective",
    "ObjectiveOutput",
]
