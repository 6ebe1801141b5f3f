#!/usr/bin/env python3
"""Wan -> a teacher with a slow time embedding. See `facm_platform.training.slow_time`."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.training.slow_time import SlowTimeConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            SlowTimeConfig,
            prepare,
            description="Make a teacher whose tangent in t is no larger than its function of an "
            "imported Wan: without the fast sinusoids of its time embedding, which is fitted to "
            "make up for them.",
        )
    )
