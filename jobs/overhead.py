#!/usr/bin/env python3
"""Measure what Ray Train, Ray Data, tracking and checkpoints cost a distillation's steps."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.training.distill import DistillConfig
from facm_platform.training.overhead import prepare

if __name__ == "__main__":
    raise SystemExit(run_job(DistillConfig, prepare, description=__doc__))
