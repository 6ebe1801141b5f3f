"""The images of a latent set, as evaluation sees them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from facm_core.autoencoders import ImageShape
from facm_core.models.base import entry
from facm_platform.evaluation.protocol import quantise
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.autoencoder import autoencoder_of


def real_images(
    uri: str, manifest: LatentManifest, batch_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row once, decoded and quantised: uint8 images (B, C, H, W) and labels (B,).

    The order is that of one epoch with seed 0: fixed by the set alone.
    """
    autoencoder = autoencoder_of(manifest)
    stream = LatentStream(uri, manifest, seed=0)
    for batch in local_batches(stream, 0, manifest.rows, batch_rows):
        images = autoencoder.decode(manifest.denormalise(batch.latents))
        yield quantise(images), entry(batch.condition, "label")


def image_shape(manifest: LatentManifest) -> ImageShape:
    """Shape of the decoded images of a set."""
    latent = torch.zeros(1, *manifest.latent_shape)
    channels, height, width = autoencoder_of(manifest).decode(latent).shape[1:]
    return (channels, height, width)
