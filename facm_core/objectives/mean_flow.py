"""MeanFlow (arXiv 2505.13447), in our time direction: t = 0 noise, t = 1 data.

u(x_t, t, r) is the average velocity from t to r ≥ t: (r − t)·u = ∫ v(x_τ, τ) dτ over [t, r].
Differentiated by t along the flow, u = v + (r − t)·du/dt: the MeanFlow identity (equation 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Generator, Tensor

from facm_core.errors import require
from facm_core.guidance import GuidanceConfig
from facm_core.interpolant import interpolate, per_sample
from facm_core.jvp import chain_jvp
from facm_core.models.base import Condition, VelocityModel
from facm_core.objectives.base import (
    Draws,
    ObjectiveOutput,
    complete,
    draw,
    drop_condition,
    require_label_dropout,
    target_velocity,
)
from facm_core.times import TimesConfig


@dataclass(frozen=True, kw_only=True)
class MeanFlowConfig:
    """MeanFlow; the defaults are the paper's ImageNet values, without guidance.

    Attributes:
        interval_share: Probability of r ≠ t; the other rows are plain flow matching.
        p: Exponent of the adaptive weight; 0 is the squared error itself.
        c: Offset of the adaptive weight, > 0.
        guidance: Guidance of the target velocity.
        label_dropout: Probability of the null condition.
        times: Distribution of the two times, of which t is the earlier one.
    """

    interval_share: float = 0.25
    p: float = 1.0
    c: float = 1e-3
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    label_dropout: float = 0.1
    times: TimesConfig = field(
        default_factory=lambda: TimesConfig(kind="logit_normal", mean=0.4, std=1.0)
    )

    def __post_init__(self) -> None:
        share = self.interval_share
        require(0 <= share <= 1, "interval_share", share, "not a probability", "Use e.g. 0.25")
        require(0 <= self.p < math.inf, "p", self.p, "not an exponent", "Use a number from 0")
        require(self.c > 0, "c", self.c, "not positive", "Use e.g. 1e-3")
        require_label_dropout(self.label_dropout)


class MeanFlow:
    """L = mean(e / sg((e + c)^p)), e = ‖u − sg(v + (r − t)·du/dt)‖² of each sample.

    Args:
        config: Adaptive weight, guidance, times.
        recompute: Passed to `chain_jvp`: less memory for one more forward pass of each block.
    """

    def __init__(self, config: MeanFlowConfig, *, recompute: bool = False) -> None:
        self.config = config
        self.recompute = recompute
        self.times = config.times.build()

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> Draws:
        """Noise, times t ≤ r and label dropout for data of `shape` (B, …)."""
        draws = draw(shape, self.times, self.config.label_dropout, generator)
        n, device = shape[0], draws.t.device
        other = self.times.sample(n, generator=generator, device=device)
        is_interval = torch.rand(n, generator=generator, device=device) < self.config.interval_share
        t, later = torch.minimum(draws.t, other), torch.maximum(draws.t, other)
        return replace(draws, t=t, r=torch.where(is_interval, later, t))

    def __call__(
        self,
        student: VelocityModel,
        x_1: Tensor,
        condition: Condition,
        teacher: VelocityModel | None = None,
        *,
        x_0: Tensor | None = None,
        t: Tensor | None = None,
        r: Tensor | None = None,
        dropped: Tensor | None = None,
        generator: Generator | None = None,
        images_seen: int = 0,
    ) -> ObjectiveOutput:
        """Loss of `student` on data x_1 (B, C, H, W).

        Args:
            student: Network under training, with a second time.
            x_1: Normalised data.
            condition: Conditioning of the B rows.
            teacher: Frozen velocity network; without one, training is from scratch on x_1 − x_0.
            x_0: Noise like x_1.
            t: Times (B,).
            r: Second times (B,); where one is before t, t itself.
            dropped: Rows with the null condition, boolean (B,).
            generator: Source of the draws that are not given.
            images_seen: Images trained on so far; MeanFlow's loss does not depend on it.

        Raises:
            InvalidInputError: the student has no second time.
        """
        self.check_student(student)
        draws = complete(
            self.draw(tuple(x_1.shape), generator), x_1, x_0=x_0, t=t, dropped=dropped, r=r
        )
        t = draws.t
        r = torch.maximum(t, cast(Tensor, draws.r))
        condition = drop_condition(student, condition, draws.dropped)
        x_t = interpolate(draws.x_0, x_1, t)
        v = target_velocity(
            student, teacher, self.config.guidance, x_t, x_1, condition, draws, (t, t)
        )

        u, du_dt = chain_jvp(
            student, (x_t, t), (v, torch.ones_like(t)), condition, r, recompute=self.recompute
        )
        u, du_dt = u.to(v.dtype), du_dt.to(v.dtype)
        e = (u - average_velocity(v, du_dt, t, r)).square().flatten(1).sum(1)
        loss = (adaptive_weight(e, self.config.p, self.config.c) * e).mean()
        metrics = {
            "loss_mse": e.detach().mean() / u[0].numel(),
            "tangent_rms": du_dt.square().mean().sqrt(),
        }
        rows = {"t": t, "loss_mse": e.detach() / u[0].numel()}
        return ObjectiveOutput(loss=loss, metrics=metrics, rows=rows)

    def check_student(self, student: VelocityModel) -> None:
        """Raise `InvalidInputError` unless the student has a second time."""
        require(
            student.second_time,
            "second_time",
            student.second_time,
            "MeanFlow asks the student for an average velocity from t to r",
            "Use a student with second_time = True",
        )


def average_velocity(v: Tensor, du_dt: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """v + (r − t)·du/dt, the average velocity from t to r by the MeanFlow identity."""
    return v + per_sample(r - t, v) * du_dt


def adaptive_weight(e: Tensor, p: float, c: float) -> Tensor:
    """1 / sg((e + c)^p); e (B,) is a squared norm, not a mean over values."""
    return (e.detach() + c) ** -p
