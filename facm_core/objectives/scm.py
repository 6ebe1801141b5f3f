"""sCM, continuous-time consistency models (arXiv 2410.11081), on the linear interpolant.

F(x_t, t) is the average velocity from t to data, f = x_t + (1 − t)·F the consistency function, and
df/dt = v − F + (1 − t)·dF/dt. The paper's TrigFlow has the same f at the time θ = arctan((1 − t)/t)
and the point x_t/n, n = √(t² + (1 − t)²), where cos θ = t/n and dθ/dt = −1/n²: its tangent
cos θ·df/dθ is −t·n·df/dt. Its network is −n·F plus what θ and the point alone determine, so that
where the paper's F follows cos θ·df/dθ, ours follows the opposite, t·n·df/dt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn

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

FREQUENCIES = 128  # width of the time features of w(t)


@dataclass(frozen=True, kw_only=True)
class SCMConfig:
    """sCM; the defaults are the paper's ImageNet 512 values, without guidance.

    Attributes:
        warmup_images: Images until dF/dt counts in full; 0 for no warm-up.
        c: Offset of the tangent normalisation g / (‖g‖ + c), > 0.
        guidance: Guidance of the target velocity; needs a teacher.
        label_dropout: Probability of the null condition.
        times: Distribution of t; a noise-to-data ratio (1 − t)/t of e^τ/σ_d, τ ~ N(−0.8, 1.6²)
            and σ_d = 1/2, is logit-normal with mean 0.8 − ln 2.
    """

    warmup_images: int = 10_000 * 2048
    c: float = 0.1
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    label_dropout: float = 0.1
    times: TimesConfig = field(
        default_factory=lambda: TimesConfig(kind="logit_normal", mean=0.8 - math.log(2), std=1.6)
    )

    def __post_init__(self) -> None:
        warmup = self.warmup_images
        require(warmup >= 0, "warmup_images", warmup, "negative", "Use 0 for no warm-up")
        require(self.c > 0, "c", self.c, "not positive", "Use e.g. 0.1")
        require_label_dropout(self.label_dropout)


class SCM(nn.Module):
    """L = mean(e^w(t)/D·‖F − sg(F) − ĝ‖² − w(t)), ĝ = g / (‖g‖ + c), D values a sample.

    The weight w is learned with the student: its parameters are this module's, and need an
    optimizer and a reduction over ranks (``fully_shard(scm.log_weight)``) like the student's.

    Args:
        config: Warm-up, normalisation, guidance, times.
        recompute: Passed to `chain_jvp`: less memory for one more forward pass of each block.
    """

    def __init__(self, config: SCMConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.times = config.times.build()
        self.log_weight = LogWeight()

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> Draws:
        """Noise, times and label dropout for data of `shape` (B, …)."""
        return draw(shape, self.times, self.config.label_dropout, generator)

    def forward(
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
            student: Network under training; one with a second time is told r = 1.
            x_1: Normalised data.
            condition: Conditioning of the B rows.
            teacher: Frozen velocity network; without one, training is from scratch on x_1 − x_0.
            x_0: Noise like x_1.
            t: Times (B,).
            dropped: Rows with the null condition, boolean (B,).
            generator: Source of the draws that are not given.
            images_seen: Images trained on so far, for the warm-up.

        Raises:
            InvalidInputError: guidance without a teacher.
        """
        self.check_teacher(teacher)
        draws = complete(self.draw(tuple(x_1.shape), generator), x_1, x_0=x_0, t=t, dropped=dropped)
        t = draws.t
        condition = drop_condition(student, condition, draws.dropped)
        x_t = interpolate(draws.x_0, x_1, t)
        # (t, t) is never asked: see `check_teacher`.
        v = target_velocity(
            student, teacher, self.config.guidance, x_t, x_1, condition, draws, (t, t)
        )

        r = torch.ones_like(t) if student.second_time else None
        F, dF_dt = chain_jvp(
            student, (x_t, t), (v, torch.ones_like(t)), condition, r, recompute=self.recompute
        )
        F, dF_dt = F.to(v.dtype), dF_dt.to(v.dtype)
        warm = warmup(images_seen, self.config.warmup_images)
        g = tangent(F.detach(), v, dF_dt, t, warm)
        norm = g.flatten(1).norm(dim=1)
        error = F - F.detach() - g / per_sample(norm + self.config.c, g)
        w = self.log_weight(t)
        loss = (w.exp() * error.square().flatten(1).mean(1) - w).mean()
        metrics = {
            "tangent_norm": norm.mean(),
            "tangent_warmup": norm.new_tensor(warm),
            "log_weight": w.detach().mean(),
        }
        rows = {"t": t, "tangent_norm": norm}
        return ObjectiveOutput(loss=loss, metrics=metrics, rows=rows)

    def check_teacher(self, teacher: VelocityModel | None) -> None:
        """Raise `InvalidInputError` where guidance has nobody to ask.

        The student's own velocities are all averages up to data: none of them is a v_u.
        """
        scale = self.config.guidance.scale
        require(
            teacher is not None or scale == 1,
            "guidance.scale",
            scale,
            "without a teacher nothing gives the unconditional velocity",
            "Use 1, or a teacher",
        )


class LogWeight(nn.Module):
    """w(t) = Σ_k a_k·cos(k·π·t), the log of a loss's weight, 0 at first: (B,) -> (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(FREQUENCIES))

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(FREQUENCIES, device=t.device)
        features = torch.cos(t[:, None] * k * torch.pi)
        return features.to(self.weight.dtype) @ self.weight


def tangent(F: Tensor, v: Tensor, dF_dt: Tensor, t: Tensor, warm: float) -> Tensor:
    """g = t·√(t² + (1 − t)²)·(v − F + warm·(1 − t)·dF/dt), (B, …), before its normalisation."""
    t = per_sample(t, v)
    return t * (t**2 + (1 - t) ** 2).sqrt() * (v - F + warm * (1 - t) * dF_dt)


def warmup(images_seen: int, warmup_images: int) -> float:
    """Share of dF/dt that counts: from 0 at the start to 1."""
    return min(1.0, images_seen / warmup_images) if warmup_images > 0 else 1.0
