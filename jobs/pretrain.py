#!/usr/bin/env python3
"""Train a teacher by flow matching on a latent set."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.training.pretrain import PretrainConfig, prepare

if __name__ == "__main__":
    raise SystemExit(run_job(PretrainConfig, prepare, description=__doc__))
