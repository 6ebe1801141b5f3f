"""Image <-> latent: the interface, and the autoencoder of sets that live in pixel space."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from facm_core.errors import InvalidInputError

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


class Autoencoder(Protocol):
    """A frozen pair of maps. Images are float32 (B, C, H, W) in [-1, 1].

    Attributes:
        id: The name `load_autoencoder` knows it by.
        sha256: Hash of everything that determines its outputs (weights and configuration).
    """

    id: str
    sha256: str

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """Shape of one latent, given the shape of one image."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to float32 latents (B, c, h, w), not normalised."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w), not normalised, to images (B, C, H, W) in [-1, 1]."""


class IdentityAutoencoder:
    """Latents are the pixels themselves; decoding clips to the range of images."""

    id = "identity"
    sha256 = hashlib.sha256(b"identity").hexdigest()

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """The image's own shape."""
        return image_shape

    def encode(self, images: Tensor) -> Tensor:
        """The images as float32."""
        return images.float()

    def decode(self, latents: Tensor) -> Tensor:
        """The latents as float32, clipped to [-1, 1]."""
        return latents.float().clamp(-1.0, 1.0)


_AUTOENCODERS: dict[str, Callable[[], Autoencoder]] = {IdentityAutoencoder.id: IdentityAutoencoder}


def load_autoencoder(id: str, field: str = "autoencoder") -> Autoencoder:
    """The autoencoder of that name.

    Raises:
        InvalidInputError: no autoencoder has that name; `field` is the one at fault.
    """
    if id not in _AUTOENCODERS:
        known = ", ".join(sorted(_AUTOENCODERS))
        raise InvalidInputError(field, id, "there is no such autoencoder", f"Use one of {known}")
    return _AUTOENCODERS[id]()
