#!/usr/bin/env python3
"""Images -> latent set. See `facm_platform.latents.encode`."""

import sys

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.latents.encode import EncodeConfig, prepare

if __name__ == "__main__":
    sys.exit(
        run_job(
            EncodeConfig,
            prepare,
            description="Encode images to a latent set: Parquet parts and a manifest, "
            "on a folder or an s3:// address.",
        )
    )
