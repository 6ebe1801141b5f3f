#!/usr/bin/env python3
"""Measure a student and its teacher (FID, classifier agreement), draw samples, register it."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.evaluation.evaluate import EvaluateConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(EvaluateConfig, prepare, description=__doc__))
