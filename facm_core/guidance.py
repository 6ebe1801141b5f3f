"""Classifier-free guidance of a velocity field, on an interval (arXiv 2207.12598, 2404.07724)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from facm_core.errors import require
from facm_core.models.base import Condition, VelocityModel, concatenate, select_rows


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Guidance scale w where ``low <= t <= high``, none elsewhere.

    Attributes:
        scale: w; 1 means the conditional velocity itself.
        low: Start of the interval (t = 0 is noise).
        high: End of the interval.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        finite = 0 <= self.scale < math.inf
        require(finite, "scale", self.scale, "not a scale", "Use 1 for no guidance")
        require(
            0 <= self.low <= self.high <= 1,
            "low",
            self.low,
            f"[low, high] = [{self.low}, {self.high}] is not an interval inside [0, 1]",
            "Use 0 <= low <= high <= 1",
        )

    def rows(self, t: Tensor) -> Tensor:
        """Which of the times t (B,) are guided, boolean (B,)."""
        if self.scale == 1:
            return torch.zeros_like(t, dtype=torch.bool)
        return (t >= self.low) & (t <= self.high)


def guide(v_c: Tensor, v_u: Tensor, scale: float) -> Tensor:
    """v = v_u + w·(v_c − v_u)."""
    return v_u + scale * (v_c - v_u)


def guided_velocity(
    model: VelocityModel,
    x_t: Tensor,
    time: Tensor,
    condition: Condition,
    scale: float,
    guided: Tensor,
    *,
    r: Tensor | None = None,
    v_c: Tensor | None = None,
) -> Tensor:
    """Velocity of `model` at (x_t, time), guided in the rows that want it.

    Conditional and unconditional rows go through the model in one call; rows without guidance get
    no unconditional row.

    Args:
        model: Velocity network F(x, t, condition, r).
        x_t: Points, (B, …).
        time: First time input of the network, (B,).
        condition: Conditioning of the B rows.
        scale: Guidance scale w.
        guided: Rows to guide, boolean (B,).
        r: Second time input of the network, (B,), where it has one.
        v_c: Conditional velocity (B, …) where it is known already (training from scratch, where
            it is x_1 − x_0); the model is then asked for unconditional rows only.

    Returns:
        Velocity, (B, …).
    """
    (rows,) = torch.where(guided)
    if v_c is None:
        v = model(
            torch.cat([x_t, x_t[rows]]),
            torch.cat([time, time[rows]]),
            concatenate(condition, model.null_condition(select_rows(condition, rows))),
            None if r is None else torch.cat([r, r[rows]]),
        )
        v_c, v_u = v[: len(x_t)], v[len(x_t) :]
    elif scale == 1:
        return v_c
    else:
        # A sharded network is a collective: every rank calls it, also one without a guided row.
        asked = rows if len(rows) > 0 else rows.new_zeros(1)
        null = model.null_condition(select_rows(condition, asked))
        v_u = model(x_t[asked], time[asked], null, None if r is None else r[asked])[: len(rows)]
    return v_c.index_copy(0, rows, guide(v_c[rows], v_u.to(v_c.dtype), scale))
