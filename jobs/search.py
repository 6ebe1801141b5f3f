#!/usr/bin/env python3
"""Search for the best recipe of a distillation: anchor weight, time schedule, any other value."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.search import SearchConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            SearchConfig,
            prepare,
            description=__doc__,
            switches={"--resume": ("resume=true", "go on with the search of this name")},
        )
    )
