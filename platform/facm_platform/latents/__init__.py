"""Latent sets: written once by `encode`, then streamed in a seeded order that can be resumed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from facm_platform.latents.manifest import LatentManifest, Part
from facm_platform.latents.stream import LatentStream

if TYPE_CHECKING:
    from facm_platform.latents.batches import Batch, local_batches

__all__ = ["Batch", "LatentManifest", "LatentStream", "Part", "local_batches"]


def __getattr__(name: str) -> Any:
    # On first use, because batches load torch: two seconds and half a gigabyte for each of the
    # processes that only read rows for Ray Data.
    if name in ("Batch", "local_batches"):
        return getattr(importlib.import_module("facm_platform.latents.batches"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
