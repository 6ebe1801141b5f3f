"""Time distributions against their cumulative distribution functions in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.times import ArctanLogNormal, LogitNormal, TimeDistribution, TimesConfig, Uniform

N = 200_000
BOUND = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov at a significance of one in a thousand


def normal_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def arctan_lognormal_cdf(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """t ≤ s where the normal is at least log tan(π(1 − s)/2)."""
    return lambda s: normal_cdf(-(torch.log(torch.tan(math.pi / 2 * (1 - s))) + mean) / std)


def logit_normal_cdf(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    """t ≤ s where the normal is at least logit(1 − s)."""
    return lambda s: normal_cdf((torch.log(s / (1 - s)) - mean) / std)


CASES = [
    (ArctanLogNormal(), arctan_lognormal_cdf(0.8, 1.6)),
    (ArctanLogNormal(-0.4, 0.7), arctan_lognormal_cdf(-0.4, 0.7)),
    (ArctanLogNormal(1.5, 2.0), arctan_lognormal_cdf(1.5, 2.0)),
    (LogitNormal(), logit_normal_cdf(0.0, 1.0)),
    (LogitNormal(0.4, 1.3), logit_normal_cdf(0.4, 1.3)),
    (LogitNormal(-1.0, 0.5), logit_normal_cdf(-1.0, 0.5)),
    (Uniform(), lambda s: s),
]


def ks_distance(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    s = sample.double().sort().values
    below = torch.arange(len(s), dtype=torch.float64) / len(s)
    expected = cdf(s)
    return float(torch.maximum(expected - below, below + 1 / len(s) - expected).max())


@pytest.mark.parametrize(("distribution", "cdf"), CASES, ids=[str(case) for case, _ in CASES])
def test_distribution(distribution: TimeDistribution, cdf: Callable[[Tensor], Tensor]) -> None:
    t = distribution.sample(N, generator=torch.Generator().manual_seed(3))
    assert t.shape == (N,)
    assert t.dtype == torch.float32
    assert t.min() > 0
    assert t.max() < 1
    assert ks_distance(t, cdf) < BOUND


def test_a_small_shift_would_be_noticed() -> None:
    t = ArctanLogNormal(0.8, 1.6).sample(N, generator=torch.Generator().manual_seed(3))
    assert ks_distance(t, arctan_lognormal_cdf(0.82, 1.6)) > BOUND
    assert ks_distance(t, arctan_lognormal_cdf(0.8, 1.63)) > BOUND


def test_a_larger_mean_is_cleaner() -> None:
    medians = [ArctanLogNormal(mean, 1.0).sample(10_000).median() for mean in (-1.0, 0.0, 1.0)]
    assert medians == sorted(medians)
    medians = [LogitNormal(mean, 1.0).sample(10_000).median() for mean in (-1.0, 0.0, 1.0)]
    assert medians == sorted(medians)


@pytest.mark.parametrize("distribution", [ArctanLogNormal(0.0, 20.0), LogitNormal(0.0, 20.0)])
def test_tails_beyond_float32_stay_in_the_closed_interval(distribution: TimeDistribution) -> None:
    t = distribution.sample(N, generator=torch.Generator().manual_seed(0))
    assert t.isfinite().all()
    assert t.min() >= 0
    assert t.max() <= 1


@pytest.mark.parametrize("kind", ["arctan_lognormal", "logit_normal", "uniform"])
def test_generator_decides(kind: str) -> None:
    distribution = TimesConfig(kind=kind, mean=0.3, std=0.9).build()

    def sample(seed: int) -> Tensor:
        return distribution.sample(100, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_config_builds_what_it_names() -> None:
    assert TimesConfig().build() == ArctanLogNormal(0.8, 1.6)
    assert TimesConfig(kind="logit_normal", mean=0.2, std=3.0).build() == LogitNormal(0.2, 3.0)
    assert TimesConfig(kind="uniform").build() == Uniform()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "lognormal"),
        ("mean", math.nan),
        ("mean", math.inf),
        ("std", 0.0),
        ("std", -1.0),
        ("std", math.nan),
        ("std", math.inf),
    ],
)
def test_bad_settings_are_named(field: str, value: float | str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        TimesConfig(**{field: value})
