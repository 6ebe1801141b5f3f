#!/usr/bin/env python3
"""Statistics of real images, a latent set or image files, to compare samples with."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.evaluation.reference_job import ReferenceConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(ReferenceConfig, prepare, description=__doc__))
