#!/usr/bin/env python3
"""Published latents -> latent set. See `facm_platform.latents.published`."""

import sys

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.latents.published import ImportConfig, prepare

if __name__ == "__main__":
    sys.exit(
        run_job(
            ImportConfig,
            prepare,
            description="Convert latents that the published LightningDiT or FACM code extracted "
            "(latents_rank*_shard*.safetensors) to a latent set.",
        )
    )
