#!/usr/bin/env python3
"""Prompts -> a latent set that a teacher draws. See `facm_platform.registry.synthesise`."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.registry.synthesise import SynthesiseConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            SynthesiseConfig,
            prepare,
            description="Let a teacher of texts draw latents of the prompts in a file, a line "
            "each: a latent set for a distillation without images.",
        )
    )
