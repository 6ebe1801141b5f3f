"""Distributions of the training time t in (0, 1), with t = 0 noise and t = 1 data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from facm_core.errors import require, require_one_of


class TimeDistribution(Protocol):
    """Anything that draws training times."""

    def sample(
        self,
        n: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw (n,) float32 times on `device`; `generator` must live there."""


@dataclass(frozen=True)
class ArctanLogNormal:
    """t = 1 − (2/π)·arctan(exp(N(−mean, std²))), FACM's default (arXiv 2507.03738, section 4)."""

    mean: float = 0.8
    std: float = 1.6

    def sample(
        self,
        n: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw (n,) float32 times."""
        z = torch.randn(n, generator=generator, device=device) * self.std - self.mean
        return 1 - (2 / math.pi) * torch.arctan(z.exp())


@dataclass(frozen=True)
class LogitNormal:
    """t = 1 − sigmoid(N(−mean, std²)) (SD3, arXiv 2403.03206, with our time direction)."""

    mean: float = 0.0
    std: float = 1.0

    def sample(
        self,
        n: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw (n,) float32 times."""
        z = torch.randn(n, generator=generator, device=device) * self.std - self.mean
        return 1 - torch.sigmoid(z)


@dataclass(frozen=True)
class Uniform:
    """t ~ U(0, 1)."""

    def sample(
        self,
        n: int,
        *,
        generator: Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw (n,) float32 times."""
        return torch.rand(n, generator=generator, device=device)


@dataclass(frozen=True, kw_only=True)
class TimesConfig:
    """Which time distribution, and its parameters.

    Attributes:
        kind: ``arctan_lognormal``, ``logit_normal`` or ``uniform``.
        mean: Mean of the underlying normal, in units of its argument; larger means cleaner times.
        std: Its standard deviation, > 0. Neither is used by ``uniform``.
    """

    kind: str = "arctan_lognormal"
    mean: float = 0.8
    std: float = 1.6

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, ("arctan_lognormal", "logit_normal", "uniform"))
        require(math.isfinite(self.mean), "mean", self.mean, "not finite", "Use a finite number")
        require(0 < self.std < math.inf, "std", self.std, "not positive", "Use a number above 0")

    def build(self) -> TimeDistribution:
        """The distribution described."""
        if self.kind == "arctan_lognormal":
            return ArctanLogNormal(self.mean, self.std)
        if self.kind == "logit_normal":
            return LogitNormal(self.mean, self.std)
        return Uniform()
