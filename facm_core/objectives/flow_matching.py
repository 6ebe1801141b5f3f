"""Flow matching (arXiv 2210.02747) on the expanded time interval of FACM (arXiv 2507.03738)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from facm_core.errors import require
from facm_core.interpolant import conditional_velocity, interpolate
from facm_core.models.base import Condition, VelocityModel
from facm_core.objectives.base import (
    Draws,
    ObjectiveOutput,
    complete,
    cosine_distance,
    draw,
    drop_condition,
    mean_square,
    require_label_dropout,
    row_errors,
)
from facm_core.times import TimesConfig


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig:
    """Teacher pre-training.

    Attributes:
        expanded: Every second row is told 2 − t instead of t, so that a student can start from
            the teacher with both domains known.
        lambda_cosine: Weight of mean(1 − cos(F, v)).
        label_dropout: Probability of the null condition, for classifier-free guidance.
        times: Distribution of t.
    """

    expanded: bool = True
    lambda_cosine: float = 0.0
    label_dropout: float = 0.1
    times: TimesConfig = field(
        default_factory=lambda: TimesConfig(kind="logit_normal", mean=0.0, std=1.0)
    )

    def __post_init__(self) -> None:
        require(
            0 <= self.lambda_cosine < math.inf,
            "lambda_cosine",
            self.lambda_cosine,
            "not a weight",
            "Use 0 to switch the term off",
        )
        require_label_dropout(self.label_dropout)


class FlowMatching:
    """L = mean((F − v)²) + λ·mean(1 − cos(F, v)), v = x_1 − x_0."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config
        self.times = config.times.build()

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> Draws:
        """Noise, times and label dropout for data of `shape` (B, …); every second row mirrored."""
        draws = draw(shape, self.times, self.config.label_dropout, generator)
        mirrored = torch.arange(shape[0], device=draws.t.device) % 2 == 1
        return replace(draws, mirrored=mirrored) if self.config.expanded else draws

    def __call__(
        self,
        student: VelocityModel,
        x_1: Tensor,
        condition: Condition,
        teacher: VelocityModel | None = None,
        *,
        x_0: Tensor | None = None,
        t: Tensor | None = None,
        dropped: Tensor | None = None,
        mirrored: Tensor | None = None,
        generator: Generator | None = None,
        images_seen: int = 0,
    ) -> ObjectiveOutput:
        """Loss of `student` on data x_1 (B, C, H, W); `teacher` and `images_seen` play no part."""
        drawn = self.draw(tuple(x_1.shape), generator)
        draws = complete(drawn, x_1, x_0=x_0, t=t, dropped=dropped, mirrored=mirrored)
        condition = drop_condition(student, condition, draws.dropped)
        x_t = interpolate(draws.x_0, x_1, draws.t)
        v = conditional_velocity(draws.x_0, x_1)
        time = draws.t
        if draws.mirrored is not None:
            time = torch.where(draws.mirrored, 2 - time, time)
        r = draws.t if student.second_time else None
        velocity = student(x_t, time, condition, r).to(v.dtype)
        loss_mse = mean_square(velocity, v)
        loss_cosine = cosine_distance(velocity, v)
        loss = loss_mse + self.config.lambda_cosine * loss_cosine
        metrics = {"loss_mse": loss_mse.detach(), "loss_cosine": loss_cosine.detach()}
        rows = {"t": draws.t, "loss_mse": row_errors(velocity, v)[0]}
        return ObjectiveOutput(loss=loss, metrics=metrics, rows=rows)
