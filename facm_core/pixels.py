"""Between images of real numbers in [-1, 1] and the 256 levels of a file."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise(images: Tensor) -> Tensor:
    """Images in [-1, 1] (values outside are clipped) to uint8, to the nearest level."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def dequantise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 images to `dtype` in [-1, 1]."""
    return images.to(dtype) / 127.5 - 1
