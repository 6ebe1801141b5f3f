#!/usr/bin/env python3
"""Encode, pretrain, distill, evaluate and register on handwritten digits, in minutes."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.quickstart import QuickstartConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(QuickstartConfig, prepare, description=__doc__))
