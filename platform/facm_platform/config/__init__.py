"""Recipes, overrides and the command line shared by every job."""

from facm_platform.config.job import JobResult, Refused, report, run_job
from facm_platform.config.loader import (
    as_dict,
    as_yaml,
    config_hash,
    find_recipe,
    load_config,
    revised,
)

__all__ = [
    "JobResult",
    "Refused",
    "as_dict",
    "as_yaml",
    "config_hash",
    "find_recipe",
    "load_config",
    "report",
    "revised",
    "run_job",
]
