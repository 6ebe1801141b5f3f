#!/usr/bin/env python3
"""Distill a teacher into a one-to-eight-step student by FACM."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.training.distill import DistillConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(DistillConfig, prepare, description=__doc__))
