"""Fréchet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500, eq. 6).

    d²(1, 2) = ‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½

With any roots R of Σ = R Rᵀ the last trace is the nuclear norm of R₁ᵀ R₂. It is taken from two
symmetric eigen-decompositions and one set of singular values, so rank-deficient covariances lose
no digits. A general matrix square root of the non-symmetric Σ₁Σ₂ does: one put 20-42 in print in
place of 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import linear_regression, pvariance
from typing import Self

import torch
from torch import Tensor

from facm_core.errors import InvalidInputError, require


@dataclass(frozen=True)
class Gaussian:
    """A multivariate normal distribution, as it stands for a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric and positive semi-definite up to rounding.
    """

    mean: Tensor
    covariance: Tensor

    def distance(self, other: Gaussian) -> float:
        """Squared Fréchet distance; see the module's head.

        Raises:
            InvalidInputError: different widths, or a covariance that is none.
        """
        require(
            self.mean.shape == other.mean.shape,
            "other.dimension",
            len(other.mean),
            f"expected {len(self.mean)}",
            "Compare statistics of one feature extractor only",
        )
        cross = torch.linalg.svdvals(self._root.T @ other._root).sum()
        shift = (self.mean - other.mean).square().sum()
        squared = shift + self.covariance.trace() + other.covariance.trace() - 2 * cross
        # Rounding may leave a distance of zero a little below it.
        return max(0.0, float(squared))

    @cached_property
    def _root(self) -> Tensor:
        return _square_root(self.covariance)


class FrechetStatistics:
    """Count, mean and scatter of feature vectors, in float64, from any number of batches.

    Kept as deviations from the running mean (Chan, Golub, LeVeque 1979) and not as raw sums of
    squares: the covariance of features with a large mean does not cancel, and two parts still
    merge exactly.

    Args:
        dimension: Width D of a feature vector.
    """

    def __init__(self, dimension: int) -> None:
        require(dimension > 0, "dimension", dimension, "must be positive", "Give the feature width")
        self.dimension = dimension
        self.count = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> Self:
        """Add a batch.

        Args:
            features: (N, D), any floating dtype and device.

        Raises:
            InvalidInputError: wrong shape, or a value that is not finite.
        """
        require(
            features.ndim == 2 and features.shape[1] == self.dimension,
            "features.shape",
            tuple(features.shape),
            f"expected (N, {self.dimension})",
            "Give one row per sample, from the extractor these statistics were made for",
        )
        rows = features.detach().to(torch.float64)
        finite = bool(torch.isfinite(rows).all())
        require(finite, "features", "NaN or Inf", "not finite", "Look at the images behind them")
        if len(rows) == 0:
            return self
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._add(len(rows), mean.cpu(), (centred.T @ centred).cpu())
        return self

    def merge(self, other: FrechetStatistics) -> Self:
        """Add what another instance has seen; returns self."""
        require(
            other.dimension == self.dimension,
            "other.dimension",
            other.dimension,
            f"expected {self.dimension}",
            "Merge statistics of one feature extractor only",
        )
        self._add(other.count, other._mean, other._scatter)
        return self

    @property
    def mean(self) -> Tensor:
        """Mean feature (D,)."""
        self._require_samples(1)
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D)."""
        self._require_samples(2)
        return self._scatter / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """The normal distribution of this mean and covariance."""
        return Gaussian(self.mean, self.covariance)

    def distance(self, other: FrechetStatistics | Gaussian) -> float:
        """Squared Fréchet distance to `other` ("the FID", where the features are Inception's).

        Raises:
            InvalidInputError: different widths, or fewer than two samples on a side.
        """
        return self.gaussian.distance(_gaussian(other))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as plain tensors: ``count`` (), ``mean`` (D,), ``scatter`` (D, D)."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "mean": self._mean.clone(),
            "scatter": self._scatter.clone(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> FrechetStatistics:
        """The instance that `state_dict` described."""
        statistics = cls(len(state["mean"]))
        statistics._add(int(state["count"]), state["mean"], state["scatter"])
        return statistics

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self._mean
        self._scatter = (
            self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        )
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def _require_samples(self, minimum: int) -> None:
        enough = self.count >= minimum
        require(enough, "count", self.count, "too few samples", f"Add at least {minimum}")


def distance_with_error(
    parts: Sequence[FrechetStatistics], reference: FrechetStatistics | Gaussian
) -> tuple[float, float]:
    """Distance of all parts together to `reference`, and its standard error.

    By the jack-knife over the parts (Tukey 1958): with d₍ᵢ₎ the distance of all but part i,
    s² = (n − 1)/n · Σᵢ (d₍ᵢ₎ − d̄)². That of the reference itself is not in it.

    Args:
        parts: Two or more, of equally many samples.
        reference: What they are compared with.
    """
    count, other = len(parts), _gaussian(reference)
    require(count > 1, "parts", count, "no error from fewer than two", "Give e.g. ten")
    without_one = [_together([*parts[:i], *parts[i + 1 :]]).distance(other) for i in range(count)]
    return _together(parts).distance(other), math.sqrt((count - 1) * pvariance(without_one))


def extrapolated_distance(
    parts: Sequence[FrechetStatistics], reference: FrechetStatistics | Gaussian
) -> float:
    """Distance to `reference` that infinitely many samples would have: FID∞.

    The distance of N samples is too large by c/N + o(1/N). So a line through the distances of the
    first half of the parts, and of every number of them from there on, over 1/N, is followed to
    1/N = 0 (Chong & Forsyth, arXiv 1911.07023, section 4).

    Args:
        parts: Three or more, in the order of the samples.
        reference: What they are compared with; its own bias stays.
    """
    count, other = len(parts), _gaussian(reference)
    require(count > 2, "parts", count, "no line through fewer than three", "Give e.g. ten")
    some = [_together(parts[:number]) for number in range((count + 1) // 2, count + 1)]
    inverse = [1 / statistics.count for statistics in some]
    return linear_regression(inverse, [statistics.distance(other) for statistics in some]).intercept


def _together(parts: Iterable[FrechetStatistics]) -> FrechetStatistics:
    first, *others = parts
    together = FrechetStatistics(first.dimension)
    for part in (first, *others):
        together.merge(part)
    return together


def _gaussian(statistics: FrechetStatistics | Gaussian) -> Gaussian:
    return statistics if isinstance(statistics, Gaussian) else statistics.gaussian


def self_test() -> None:
    """Compare with the closed form for commuting covariances; run before numbers are trusted.

    For Σ = Q diag(s²) Qᵀ with a common Q, d² = ‖μ₁ − μ₂‖² + ‖s₁ − s₂‖². One direction has no
    variance on one side and another none on both, where faulty square roots show.

    Raises:
        RuntimeError: the two differ by more than 1e-9, relative.
    """
    s_1 = torch.tensor([3.0, 1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    s_2 = torch.tensor([1.0, 2.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    mean = torch.tensor([0.5, -1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    # A Householder reflection: orthogonal, dense and without randomness.
    axis = torch.arange(1, 6, dtype=torch.float64)
    q = torch.eye(5, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.square().sum()
    expected = float(mean.square().sum() + (s_1 - s_2).square().sum())
    first = Gaussian(torch.zeros_like(mean), q @ torch.diag(s_1**2) @ q.T)
    got = first.distance(Gaussian(mean, q @ torch.diag(s_2**2) @ q.T))
    if not math.isclose(got, expected, rel_tol=1e-9):
        raise RuntimeError(f"Fréchet distance self-test: got {got!r}, expected {expected!r}")


def _square_root(covariance: Tensor) -> Tensor:
    """R (D, D) with R Rᵀ = `covariance`; directions without variance are exactly zero."""
    values, vectors = torch.linalg.eigh(covariance)
    largest = float(values[-1])
    noise = len(values) * torch.finfo(values.dtype).eps * largest
    if float(values[0]) < -1e3 * max(noise, torch.finfo(values.dtype).tiny):
        raise InvalidInputError(
            "covariance",
            float(values[0]),
            "has a clearly negative eigenvalue",
            "Give a symmetric positive semi-definite matrix",
        )
    # Below `noise` an eigenvalue is rounding; its root would be far above rounding (√ε).
    return vectors * torch.where(values > noise, values, 0.0).sqrt()
