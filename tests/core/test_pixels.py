"""256 levels."""

from __future__ import annotations

import torch

from facm_core.pixels import dequantise, quantise


def test_quantisation_rounds_to_the_nearest_of_256_levels_and_clips() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    expected = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(levels), expected)
    assert torch.equal(quantise(levels + 0.49 / 127.5), expected)
    assert quantise(torch.tensor([-1.7, 1.7])).tolist() == [0, 255]
    assert torch.equal(dequantise(expected, torch.float64), levels)
