#!/usr/bin/env python3
"""Serve a registered model's champion over HTTP until interrupted."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.serving import ServeConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(ServeConfig, prepare, description=__doc__))
