"""Precision and recall of generated features (Kynkäänniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor

from facm_core.errors import require
from facm_core.metrics.features import fewest_features


def precision_recall(
    generated: Tensor, real: Tensor, *, neighbours: int = 3, rows: int = 1000
) -> tuple[float, float]:
    """Shares of each set within the manifold of the other (equation 2).

    A manifold is the union of balls around the features of a set, each as wide as the distance to
    its k-th nearest neighbour in the set.

    Args:
        generated: Features (N, D).
        real: Features (M, D).
        neighbours: k.
        rows: Distances of so many features at once: memory only.

    Returns:
        Precision, the share of generated features that look real, and recall, the share of real
        ones that could be generated.

    Raises:
        InvalidInputError: different widths, or no more than k features on a side.
    """
    fewest = fewest_features(generated, real)
    require(
        1 <= neighbours < fewest,
        "neighbours",
        neighbours,
        f"not from 1 to less than the {fewest} features of the smaller side",
        "Use fewer neighbours or more samples",
    )
    return _covered(generated, real, neighbours, rows), _covered(real, generated, neighbours, rows)


def _covered(points: Tensor, manifold: Tensor, neighbours: int, rows: int) -> float:
    """Share of `points` within a ball around any feature of `manifold`."""
    # A feature is the nearest to itself.
    radii = [torch.cdist(some, manifold).kthvalue(neighbours + 1) for some in manifold.split(rows)]
    radius = torch.cat([found.values for found in radii])
    inside = sum(
        int((torch.cdist(some, manifold) <= radius).any(dim=1).sum()) for some in points.split(rows)
    )
    return inside / len(points)
