"""Flow-Anchored Consistency Models (arXiv 2507.03738)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from facm_core.errors import require, require_one_of
from facm_core.guidance import GuidanceConfig
from facm_core.interpolant import interpolate, per_sample
from facm_core.jvp import anchored_jvp
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
    target_velocity,
)
from facm_core.times import TimesConfig


@dataclass(frozen=True, kw_only=True)
class FACMConfig:
    """FACM; the defaults are the paper's ImageNet values.

    Attributes:
        lambda_cm: Weight of the shortcut (consistency) task.
        lambda_fm: Weight of the anchor (flow matching) task, "the anchor weight".
        p: Exponent of the relaxation α(t) = 1 − t^p.
        c: Offset of the adaptive L2 weight, > 0.
        conditioning: ``expanded``: the anchor is told 2 − t, the shortcut t. ``auxiliary``: a
            second time r tells them apart, r = t for the anchor, r = 1 for the shortcut.
        guidance: Guidance of the target velocity.
        label_dropout: Probability of the null condition.
        times: Distribution of t.
    """

    lambda_cm: float = 1.0
    lambda_fm: float = 1.0
    p: float = 0.5
    c: float = 1e-3
    conditioning: str = "expanded"
    guidance: GuidanceConfig = field(default_factory=lambda: GuidanceConfig(scale=1.75, low=0.125))
    label_dropout: float = 0.1
    times: TimesConfig = field(default_factory=TimesConfig)

    def __post_init__(self) -> None:
        for name in ("lambda_cm", "lambda_fm"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "not a weight", "Use a number from 0")
        require(0 < self.p < math.inf, "p", self.p, "not positive", "Use e.g. 0.5")
        require(self.c > 0, "c", self.c, "not positive", "Use e.g. 1e-3")
        require_one_of("conditioning", self.conditioning, ("expanded", "auxiliary"))
        require_label_dropout(self.label_dropout)


class FACM:
    """L = λ_CM·mean(L_CM) + λ_FM·mean(L_FM): one network, two tasks.

    Args:
        config: Weights, conditioning, guidance, times.
        recompute: Passed to `chain_jvp`: less memory for one more forward pass of each block.
    """

    def __init__(self, config: FACMConfig, *, recompute: bool = False) -> None:
        self.config = config
        self.recompute = recompute
        self.times = config.times.build()

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> Draws:
        """Noise, times and label dropout for data of `shape` (B, …)."""
        return draw(shape, self.times, self.config.label_dropout, generator)

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
        generator: Generator | None = None,
        images_seen: int = 0,
    ) -> ObjectiveOutput:
        """Loss of `student` on data x_1 (B, C, H, W).

        Args:
            student: Network under training; with a second time iff `conditioning` is auxiliary.
            x_1: Normalised data.
            condition: Conditioning of the B rows.
            teacher: Frozen velocity network; without one, training is from scratch on x_1 − x_0.
            x_0: Noise like x_1.
            t: Times (B,).
            dropped: Rows with the null condition, boolean (B,).
            generator: Source of the draws that are not given.
            images_seen: Images trained on so far; FACM's loss does not depend on it.

        Raises:
            InvalidInputError: the student's time inputs do not fit `conditioning`.
        """
        self.check_student(student)
        draws = complete(self.draw(tuple(x_1.shape), generator), x_1, x_0=x_0, t=t, dropped=dropped)
        t = draws.t
        condition = drop_condition(student, condition, draws.dropped)
        x_t = interpolate(draws.x_0, x_1, t)
        instantaneous = anchor_time(t, self.config.conditioning)
        v = target_velocity(
            student, teacher, self.config.guidance, x_t, x_1, condition, draws, instantaneous
        )
        return self.loss(student, x_t, t, v, condition)

    def loss(
        self, student: VelocityModel, x_t: Tensor, t: Tensor, v: Tensor, condition: Condition
    ) -> ObjectiveOutput:
        """Both tasks at the points x_t (B, C, H, W) and times t (B,), in one call of `student`.

        Args:
            student: Network under training.
            x_t: Points.
            t: Times.
            v: Target velocity there, like x_t.
            condition: Conditioning of the B rows.
        """
        time_fm, r_fm = anchor_time(t, self.config.conditioning)
        time_cm, r_cm = shortcut_time(t, self.config.conditioning)
        f_fm, f_cm, df_dt = anchored_jvp(
            student,
            (x_t, time_fm, condition, r_fm),
            (x_t, time_cm),
            (v, torch.ones_like(t)),
            condition,
            r_cm,
            recompute=self.recompute,
        )
        return self.combine(f_fm.to(v.dtype), f_cm.to(v.dtype), df_dt.to(v.dtype), v, t)

    def combine(
        self, f_fm: Tensor, f_cm: Tensor, df_dt: Tensor, v: Tensor, t: Tensor
    ) -> ObjectiveOutput:
        """The losses of what the network gave: F at the anchor, F and dF/dt at the shortcut."""
        loss_fm = mean_square(f_fm, v) + cosine_distance(f_fm, v)
        g = consistency_residual(f_cm.detach(), v, df_dt, t)
        target = f_cm.detach() - per_sample(alpha(t, self.config.p), g) * g.clamp(-1, 1)
        losses_cm = beta(t) * adaptive_square(f_cm, target, self.config.c)
        loss_cm = losses_cm.mean()
        metrics = {
            "loss_fm": loss_fm.detach(),
            "loss_cm": loss_cm.detach(),
            "tangent_rms": df_dt.square().mean().sqrt(),
            "clipped_share": (g.abs() > 1).to(v.dtype).mean(),
        }
        loss = self.config.lambda_cm * loss_cm + self.config.lambda_fm * loss_fm
        losses_fm = sum(row_errors(f_fm, v), torch.zeros_like(t))
        rows = {"t": t, "loss_fm": losses_fm, "loss_cm": losses_cm.detach()}
        return ObjectiveOutput(loss=loss, metrics=metrics, rows=rows)

    def tasks(self) -> tuple[FACM, FACM]:
        """The anchor alone, and the shortcut alone."""
        configs = replace(self.config, lambda_cm=0.0), replace(self.config, lambda_fm=0.0)
        anchor, shortcut = (FACM(config, recompute=self.recompute) for config in configs)
        return anchor, shortcut

    def anchor_error(
        self,
        student: VelocityModel,
        x_1: Tensor,
        condition: Condition,
        teacher: VelocityModel | None,
        draws: Draws,
    ) -> tuple[Tensor, Tensor]:
        """Σ‖F − v‖² and Σ‖v‖² of the student's velocity F at the anchor, without graph.

        Args:
            student: Network under training.
            x_1: Normalised data.
            condition: Conditioning of its rows.
            teacher: Frozen velocity network, or None.
            draws: Noise, times and dropped rows.
        """
        time, r = anchor_time(draws.t, self.config.conditioning)
        x_t = interpolate(draws.x_0, x_1, draws.t)
        condition = drop_condition(student, condition, draws.dropped)
        v = target_velocity(
            student, teacher, self.config.guidance, x_t, x_1, condition, draws, (time, r)
        )
        with torch.no_grad():
            velocity = student(x_t, time, condition, r).to(v.dtype)
        return (velocity - v).square().sum(), v.square().sum()

    def check_student(self, student: VelocityModel) -> None:
        """Raise `InvalidInputError` unless the student's time inputs fit the conditioning."""
        needs_second_time = self.config.conditioning == "auxiliary"
        require(
            student.second_time == needs_second_time,
            "conditioning",
            self.config.conditioning,
            f"the student has second_time = {student.second_time}",
            f"Use a student with second_time = {needs_second_time}, or the other conditioning",
        )


def anchor_time(t: Tensor, conditioning: str) -> tuple[Tensor, Tensor | None]:
    """(time, r) that tell the network to give an instantaneous velocity, each (B,)."""
    return (2 - t, None) if conditioning == "expanded" else (t, t)


def shortcut_time(t: Tensor, conditioning: str) -> tuple[Tensor, Tensor | None]:
    """(time, r) that tell the network to give the average velocity from t to 1, each (B,)."""
    return (t, None) if conditioning == "expanded" else (t, torch.ones_like(t))


def consistency_residual(f: Tensor, v: Tensor, df_dt: Tensor, t: Tensor) -> Tensor:
    """g = sg(F) − v̄ with the average velocity v̄ = v + (1 − t)·dF/dt."""
    return f - (v + (1 - per_sample(t, v)) * df_dt)


def alpha(t: Tensor, p: float) -> Tensor:
    """Relaxation α(t) = 1 − t^p."""
    return 1 - t**p


def beta(t: Tensor) -> Tensor:
    """Time weight β(t) = cos(π·t/2)."""
    return torch.cos(math.pi / 2 * t)


def adaptive_square(f: Tensor, target: Tensor, c: float) -> Tensor:
    """e / sg((e + c)^½), e = mean((F − target)²) of each sample: (B,)."""
    e = (f - target).square().flatten(1).mean(1)
    return e / (e + c).sqrt().detach()
