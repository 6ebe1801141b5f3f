"""Where the images of a latent set come from.

A source names its images in pieces, one for each part of the set, in the job's own process; a Ray
worker then reads the images of a piece, one after the other.
"""

from facm_platform.latents.images.base import BrokenImageError, ImageSource, Piece, Sample
from facm_platform.latents.images.source import ImagesConfig, image_source

__all__ = [
    "BrokenImageError",
    "ImageSource",
    "ImagesConfig",
    "Piece",
    "Sample",
    "image_source",
]
