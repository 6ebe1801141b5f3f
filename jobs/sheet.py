#!/usr/bin/env python3
"""Draw a student in a few steps beside its teacher in many, for fixed prompts."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.evaluation.prompt_sheet import SheetConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(SheetConfig, prepare, description=__doc__))
