#!/usr/bin/env python3
"""A model of Wan -> a pipeline of diffusers. See `facm_platform.registry.to_diffusers`."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.registry.to_diffusers import ToDiffusersConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            ToDiffusersConfig,
            prepare,
            description="Write a student or teacher of Wan as a folder that diffusers' own "
            "WanPipeline loads, with vae, text_encoder and tokenizer of the pipeline that it was "
            "imported from.",
        )
    )
