"""What sees features in images: the interface of all extractors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from facm_core.autoencoders import ImageShape
from facm_core.errors import require
from facm_platform.latents import LatentManifest


@dataclass(frozen=True)
class Seen:
    """What an extractor sees in a batch of N images.

    Attributes:
        features: (N, D).
        logits: (N, C) of its classes; None where it knows none.
        labels: (N,) int64, the classes of the latent set that it sees; None where its own differ.
        spatial: (N, S), features that tell where things are; None where it has none.
    """

    features: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    spatial: Tensor | None = None


class Extractor(ABC):
    """Features of images; a network whose weights lie somewhere.

    Attributes:
        uri: Of its weights, absolute.
        sha256: Of the file.
        name: Short, part of protocol ids.
        dimension: D, width of `Seen.features`.
        classes: C, width of `Seen.logits`; None for no logits.
        spatial_dimension: S, width of `Seen.spatial`; None for none.
        resize: How it makes its own size of images, as a protocol names it.
        precision: Floating type in which it is to be used, as a protocol names it.
    """

    classes: int | None = None
    spatial_dimension: int | None = None
    resize: ClassVar[str] = "none"
    precision: ClassVar[str] = "float64"

    def __init__(self, uri: str, sha256: str, name: str, dimension: int) -> None:
        self.uri, self.sha256, self.name, self.dimension = uri, sha256, name, dimension

    @property
    def describe(self) -> str:
        """For the terminal."""
        return self.uri

    def check(self, field: str, shape: ImageShape, manifest: LatentManifest | None = None) -> None:
        """Raise `InvalidInputError` unless it can see these images: photographs, if nothing else.

        Args:
            field: Configuration field that named it, for messages.
            shape: Of the images, (C, H, W).
            manifest: Of the latent set that they are decoded from, if they are.
        """
        problem = f"the images have {shape[0]} channels, this extractor sees 3"
        remedy = "Use one that was fitted to them with jobs/fit_features.py"
        require(shape[0] == 3, field, self.uri, problem, remedy)

    @abstractmethod
    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Moved and converted in place; returns self."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Seen:
        """Look at uint8 images (N, C, H, W)."""
