"""Training objectives, one file per paper."""

from facm_core.objectives.base import Draws, Objective, ObjectiveOutput
from facm_core.objectives.facm import FACM, FACMConfig
from facm_core.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from facm_core.objectives.mean_flow import MeanFlow, MeanFlowConfig
from facm_core.objectives.scm import SCM, SCMConfig

__all__ = [
    "FACM",
    "SCM",
    "Draws",
    "FACMConfig",
    "FlowMatching",
    "FlowMatchingConfig",
    "MeanFlow",
    "MeanFlowConfig",
    "Objective",
    "ObjectiveOutput",
    "SCMConfig",
]
