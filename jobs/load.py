#!/usr/bin/env python3
"""Put load on a service of jobs/serve.py: images a second, and how long a request takes."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.serving.load import LoadConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(LoadConfig, prepare, description=__doc__))
