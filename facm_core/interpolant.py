"""The linear interpolant between noise and data (rectified flow).

Symbols, everywhere in this package: ``x_0`` ~ N(0, I) is noise, ``x_1`` is data, ``t = 0`` is noise
and ``t = 1`` is data. Shapes: x (B, ...), t (B,).
"""

from __future__ import annotations

from torch import Tensor


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """View t (B,) so that it broadcasts against x (B, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t = t·x_1 + (1 − t)·x_0 (FACM, arXiv 2507.03738, section 3)."""
    t = per_sample(t, x_1)
    return t * x_1 + (1 - t) * x_0


def conditional_velocity(x_0: Tensor, x_1: Tensor) -> Tensor:
    """v = d x_t / dt = x_1 − x_0, the same at every t."""
    return x_1 - x_0


def predict_data(x_t: Tensor, t: Tensor, average_velocity: Tensor) -> Tensor:
    """x̂_1 = x_t + (1 − t)·F(x_t, t), the consistency function of an average velocity F."""
    return x_t + (1 - per_sample(t, x_t)) * average_velocity
