#!/usr/bin/env python3
"""Wan as diffusers keeps it -> a teacher. See `facm_platform.registry.import_wan`."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.registry.import_wan import ImportWanConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            ImportWanConfig,
            prepare,
            description="Make a teacher of a pipeline of Wan 2.1 or 2.2 for text to image, as "
            "diffusers saves it: transformer, transformer_2, vae, text_encoder, tokenizer, "
            "scheduler, model_index.json.",
        )
    )
