#!/usr/bin/env python3
"""Measure speed and memory of a FACM step on a machine of the cluster."""

import _paths  # noqa: F401

from facm_platform.benchmark import BenchmarkJobConfig, prepare
from facm_platform.config import run_job

if __name__ == "__main__":
    raise SystemExit(run_job(BenchmarkJobConfig, prepare, description=__doc__))
