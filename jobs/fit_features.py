#!/usr/bin/env python3
"""Fit the feature extractor of the Fréchet distance to a latent set of small images."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.evaluation.fit import FeaturesConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(FeaturesConfig, prepare, description=__doc__))
