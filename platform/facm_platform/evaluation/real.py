"""The images of a latent set, as evaluation sees them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from facm_core.autoencoders import ImageShape, load_autoencoder
from facm_platform.evaluation.protocol import quantise
from facm_platform.latents import LatentManifest, LatentStream, local_batches


def real_images(
    uri: str, manifest: LatentManifest, batch_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row once, decoded and quantised: uint8 images (B, C, H, W) and labels (B,).

    The order is that of one epoch with seed 0: fixed by the set alone.
    """
    autoencoder = load_autoencoder(manifest.autoencoder_id)
    stream = LatentStream(uri, manifest, seed=0, lanes=1)
    whole = manifest.rows // batch_rows * batch_rows
    batches = local_batches(stream, 0, 0, whole, batch_rows)
    if rest := manifest.rows - whole:
        batches = chain(batches, local_batches(stream, 0, whole, manifest.rows, rest))
    for batch in batches:
        images = autoencoder.decode(manifest.denormalise(batch.latents))
        yield quantise(images), batch.labels


def image_shape(manifest: LatentManifest) -> ImageShape:
    """Shape of the decoded images of a set."""
    latent = torch.zeros(1, *manifest.latent_shape)
    channels, height, width = load_autoencoder(manifest.autoencoder_id).decode(latent).shape[1:]
    return (channels, height, width)
