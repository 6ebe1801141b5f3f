"""What every comparison of two sets of features asks of them."""

from __future__ import annotations

from torch import Tensor

from facm_core.errors import require


def fewest_features(x: Tensor, y: Tensor) -> int:
    """Number of rows of the smaller set.

    Raises:
        InvalidInputError: not two matrices of one width.
    """
    require(
        x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1],
        "features.shape",
        (tuple(x.shape), tuple(y.shape)),
        "not two sets of rows of one width",
        "Compare features of one extractor only",
    )
    return min(len(x), len(y))
