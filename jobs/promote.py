#!/usr/bin/env python3
"""Make the challenger of a registered model its champion, if every gate agrees; exit 1 if not."""

import _paths  # noqa: F401

from facm_platform.config import run_job
from facm_platform.registry.promote import PromoteConfig, prepare

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            PromoteConfig,
            prepare,
            description=__doc__,
            switches={"--rollback": ("rollback=true", "make the previous champion champion again")},
        )
    )
