"""Kernel distance between two sets of features (KID: Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor

from facm_core.errors import require
from facm_core.metrics.features import fewest_features


def kernel_distance(
    x: Tensor, y: Tensor, *, subset_size: int = 1000, subsets: int = 100, seed: int = 2020
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under k(a, b) = (a·b/D + 1)³, unbiased.

    The mean over random subsets, so that it depends on the number of samples in its error only;
    slightly below zero is possible. Subsets are drawn as torch-fidelity draws them.

    Args:
        x: Features (N, D).
        y: Features (M, D) to compare with.
        subset_size: Features of each side in a subset; no more than there are.
        subsets: How many subsets.
        seed: Of their choice.

    Returns:
        Mean over the subsets, and their standard deviation.

    Raises:
        InvalidInputError: different widths, or a subset larger than a side.
    """
    fewest = fewest_features(x, y)
    require(
        2 <= subset_size <= fewest,
        "subset_size",
        subset_size,
        f"not from 2 to the {fewest} features of the smaller side",
        "Use smaller subsets or more samples",
    )
    chance = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        some = x[torch.from_numpy(chance.choice(len(x), subset_size, replace=False))]
        others = y[torch.from_numpy(chance.choice(len(y), subset_size, replace=False))]
        found.append(_discrepancy(some.to(torch.float64), others.to(torch.float64)))
    return fmean(found), pstdev(found)


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """Equation 4, for as many x as y."""
    count = len(x)
    k_xx, k_yy, k_xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()
    return float(within / (count * (count - 1)) - 2 * k_xy.mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3
