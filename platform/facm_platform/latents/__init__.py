"""Latent sets: written once by `encode`, then streamed in a seeded order that can be resumed.

Nothing here needs Ray but `source` (batches through Ray Data) and `encode`.
"""

from facm_platform.latents.batches import Batch, local_batches
from facm_platform.latents.manifest import LatentManifest, Part
from facm_platform.latents.stream import LatentStream

__all__ = ["Batch", "LatentManifest", "LatentStream", "Part", "local_batches"]
