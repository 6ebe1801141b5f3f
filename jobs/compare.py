#!/usr/bin/env python3
"""Distill one teacher by FACM, MeanFlow and sCM, and compare the students in one table."""

import _paths  # noqa: F401

from facm_platform.compare import CompareConfig, prepare
from facm_platform.config import run_job

if __name__ == "__main__":
    raise SystemExit(run_job(CompareConfig, prepare, description=__doc__))
