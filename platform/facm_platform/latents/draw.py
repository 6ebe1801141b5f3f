"""The latent that training sees of a stored row: drawn from moments, mirrored by a coin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from facm_platform.latents.tables import LATENT, LATENT_FLIP, RowFormat

Array = NDArray[np.generic]


def latents_drawn(format: RowFormat, values: Mapping[str, Array], seed: tuple[int, ...]) -> Array:
    """Latents (B, C, H, W) of stored rows; the stored ones themselves where nothing is random.

    Args:
        format: Of the set.
        values: Its columns.
        seed: Of these rows.
    """
    latents = values[LATENT]
    if not (format.flip or format.moments):
        return latents
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    if format.flip:
        mirrored = random.random(len(latents)) < 0.5
        latents = np.where(mirrored[:, None, None, None], values[LATENT_FLIP], latents)
    if format.moments:
        mean, log_variance = np.split(latents.astype(np.float32), 2, axis=1)
        noise = random.standard_normal(mean.shape, np.float32)
        latents = mean + np.exp(log_variance / 2) * noise
    return latents
