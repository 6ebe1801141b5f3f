"""Oracles of MeanFlow and sCM: the papers' formulas, and a flow whose average velocity is known.

The formulas take one sample at a time, in float64, with `torch.func.jvp` over the whole network;
they share nothing with the objectives but the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.core.conftest import ask

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class SampleOracle:
    """A loss that is the mean over samples; the guidance of its target velocity."""

    w: float = 1.0
    low: float = 0.125
    high: float = 1.0
    null_label: int = 5

    def __call__(
        self, student: Any, teacher: Any, batch: dict[str, Tensor], **weights: Tensor
    ) -> tuple[float, Gradients]:
        """Loss and its gradient by name, of the student's parameters and of `weights`."""
        samples = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        with sdpa_kernel(SDPBackend.MATH):
            losses = [self.sample_loss(student, teacher, **s, **weights) for s in samples]
        loss = torch.stack(losses).mean()
        named = {n: p for n, p in student.named_parameters() if p.requires_grad} | weights
        gradients = torch.autograd.grad(loss, list(named.values()))
        return loss.item(), dict(zip(named, gradients, strict=True))

    def sample_loss(self, student: Any, teacher: Any, **sample: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def velocity(
        self, student: Any, teacher: Any, x_t: Tensor, sample: dict[str, Tensor]
    ) -> Tensor:
        t, null = sample["t"], torch.tensor(self.null_label)
        guided = self.w != 1 and self.low <= t <= self.high and not sample["dropped"]
        if teacher is None:
            v_c = sample["x_1"] - sample["x_0"]
            return self.mix(v_c, ask(student, x_t, t, null, t)) if guided else v_c
        r = t if teacher.second_time else None
        label = null if sample["dropped"] else sample["condition"]
        v_c = ask(teacher, x_t, t, label, r)
        return self.mix(v_c, ask(teacher, x_t, t, null, r)) if guided else v_c

    def mix(self, v_c: Tensor, v_u: Tensor) -> Tensor:
        return v_u + self.w * (v_c - v_u)

    def point(self, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x_t and the label that the student is told."""
        t, dropped = sample["t"], sample["dropped"]
        x_t = t * sample["x_1"] + (1 - t) * sample["x_0"]
        return x_t, torch.tensor(self.null_label) if dropped else sample["condition"]


@dataclass(frozen=True, kw_only=True)
class MeanFlowOracle(SampleOracle):
    """arXiv 2505.13447 with t and 1 − t exchanged."""

    p: float = 1.0
    c: float = 1e-3

    def sample_loss(self, student: Any, teacher: Any, **sample: Tensor) -> Tensor:
        t, r = sample["t"], sample["r"]
        x_t, label = self.point(sample)
        v = self.velocity(student, teacher, x_t, sample)
        u, du_dt = torch.func.jvp(
            lambda x, t: ask(student, x, t, label, r), (x_t, t), (v, torch.ones_like(t))
        )
        e = ((u - (v + (r - t) * du_dt).detach()) ** 2).sum()
        return e / (e.detach() + self.c) ** self.p


@dataclass(frozen=True, kw_only=True)
class SCMOracle(SampleOracle):
    """arXiv 2410.11081, its tangent written for the linear interpolant."""

    warm: float = 1.0
    c: float = 0.1
    r: float = 1.0

    def sample_loss(self, student: Any, teacher: Any, **sample: Tensor) -> Tensor:
        t, a = sample["t"], sample["log_weight.weight"]
        x_t, label = self.point(sample)
        v = self.velocity(student, teacher, x_t, sample)
        r = torch.full_like(t, self.r) if student.second_time else None
        f, df_dt = torch.func.jvp(
            lambda x, t: ask(student, x, t, label, r), (x_t, t), (v, torch.ones_like(t))
        )
        factor = t * math.hypot(t, 1 - t)
        g = factor * (v - f.detach() + self.warm * (1 - t) * df_dt.detach())
        g = g / (math.sqrt((g**2).sum()) + self.c)
        w = sum(a[k] * math.cos(k * math.pi * t) for k in range(len(a)))
        return torch.exp(w) / f.numel() * ((f - (f.detach() + g)) ** 2).sum() - w


class GaussianFlow(nn.Module):
    """The flow from N(0, 1) to data from N(μ, s²), value by value.

    x_t has mean t·μ and variance σ_t² = t²·s² + (1 − t)², and x_r = r·μ + (σ_r/σ_t)·(x_t − t·μ).
    Called with r it gives the average velocity from t to r, without a second time that to r = 1.
    """

    blocks = ()

    def __init__(self, mean: float, std: float, second_time: bool = True) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        self.second_time = second_time

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, r: Tensor | None = None) -> Tensor:
        t, r = (s.view(-1, 1, 1, 1) for s in (t, torch.ones_like(t) if r is None else r))
        sigma_t, sigma_r = self.sigma(t), self.sigma(r)
        # (σ_r/σ_t − 1) / (r − t), and its limit at r = t.
        slope = (self.std**2 * (r + t) + r + t - 2) / (sigma_t * (sigma_r + sigma_t))
        return self.mean + slope * (x - t * self.mean)

    def sigma(self, t: Tensor) -> Tensor:
        return (t**2 * self.std**2 + (1 - t) ** 2).sqrt()

    def null_condition(self, condition: Tensor) -> Tensor:
        return condition


def loss_and_gradients(
    objective: Any, student: nn.Module, teacher: Any, batch: dict[str, Tensor], **settings: Any
) -> tuple[float, Gradients, dict[str, Tensor]]:
    """Loss, gradients by name (an objective's own parameters included) and metrics."""
    modules = [student, objective] if isinstance(objective, nn.Module) else [student]
    for module in modules:
        module.zero_grad()
    given = dict(batch)
    x_1, condition = given.pop("x_1"), given.pop("condition")
    output = objective(student, x_1, condition, teacher, **given, **settings)
    output.loss.backward()
    named = {n: p for m in modules for n, p in m.named_parameters() if p.requires_grad}
    assert not any(value.requires_grad for value in output.metrics.values())
    return output.loss.item(), {n: p.grad.clone() for n, p in named.items()}, output.metrics


def values_kept(objective: Any, student: nn.Module, batch: dict[str, Tensor]) -> int:
    """How many numbers autograd keeps for the backward pass of one step."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    given = dict(batch)
    x_1, condition = given.pop("x_1"), given.pop("condition")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        objective(student, x_1, condition, **given)
    return kept
