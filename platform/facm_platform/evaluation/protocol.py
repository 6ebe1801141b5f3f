"""What a number of ours means: everything that two evaluations must share to be comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

# One stride between seeds: the samples of two seeds never share noise.
_SEED_STRIDE = 2**32


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How samples are drawn, prepared and compared.

    Attributes:
        extractor: Name of the feature extractor.
        extractor_sha256: Hash of its weights.
        reference_sha256: Hash of the manifest of the latent set that is the reference: every row,
            decoded and prepared like the samples.
        samples: Number of samples.
        seed: Sample i draws all its noise from ``seed · 2³² + i``, whoever computes it.
        label_policy: ``balanced``: sample i has label i mod num_classes.
        quantisation: ``uint8-round``: to the nearest of 256 levels of [-1, 1], half to even.
        resize: ``none``: the extractor sees images at their own size.
        precision: Floating type of network, decoder and extractor. In float32 a batch of another
            size rounds differently, and now and then a pixel falls to another grey level.
    """

    extractor: str
    extractor_sha256: str
    reference_sha256: str
    samples: int
    seed: int
    label_policy: str = "balanced"
    quantisation: str = "uint8-round"
    resize: str = "none"
    precision: str = "float64"

    @property
    def id(self) -> str:
        """Readable name and a hash of every field; equal ids, comparable numbers."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        return f"{self.extractor}-{self.samples}-{digest}"

    @property
    def dtype(self) -> torch.dtype:
        """`precision` as torch names it."""
        return {"float32": torch.float32, "float64": torch.float64}[self.precision]

    def sample_seeds(self, start: int, stop: int) -> list[int]:
        """Seeds of the samples [start, stop)."""
        return [self.seed * _SEED_STRIDE + i for i in range(start, stop)]

    def sample_labels(self, start: int, stop: int, num_classes: int) -> Tensor:
        """Labels of the samples [start, stop), int64."""
        return torch.arange(start, stop) % num_classes


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] (values outside are clipped) to uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def dequantise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images to `dtype` in [-1, 1]."""
    return images.to(dtype) / 127.5 - 1
