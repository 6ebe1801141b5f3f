"""Power-function EMA against its definition: averages weighted by p(t) ∝ t^γ (EDM2)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from facm_core.ema import PowerEMA, decay, exponent_of, synthesis_weights
from facm_core.errors import InvalidInputError

SIGMA_RELS = (0.05, 0.1, 0.2, 0.25)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_exponent_gives_the_width_asked_for(sigma_rel: float) -> None:
    """σ_rel is the standard deviation of the density (γ + 1)·t^γ on [0, 1]: by quadrature."""
    gamma = exponent_of(sigma_rel)
    t = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    density = (gamma + 1) * t**gamma / len(t)
    mean = (density * t).sum()
    assert density.sum().item() == pytest.approx(1, rel=1e-9)
    assert (density * (t - mean) ** 2).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-8)
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-12)


def test_exponents_of_the_paper() -> None:
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_decay() -> None:
    gamma = exponent_of(0.2)
    assert decay(0.2, 1000, 10) == pytest.approx(0.99 ** (gamma + 1), rel=1e-14)
    assert decay(0.2, 64, 64) == 0  # nothing is left of the weights before the first step


def run(values: list[float], images_step: int, sigma_rel: float) -> float:
    """The average after these weights, one for each step."""
    model = nn.Linear(1, 1).double()
    nn.init.constant_(model.weight, 99.0)
    ema = PowerEMA(model, [0.05, sigma_rel, sigma_rel])  # a width given twice is one profile
    for step, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        ema.update(model, images_seen=step * images_step, images_step=images_step)
    return ema.profiles[str(sigma_rel)]["weight"].item()


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_equals_the_average_weighted_by_the_profile(sigma_rel: float) -> None:
    """Weights that stay for a step each: their share is the integral of t^γ over that step."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    gamma = exponent_of(sigma_rel)
    ends = torch.arange(201, dtype=torch.float64) / 200
    weights = ends[1:] ** (gamma + 1) - ends[:-1] ** (gamma + 1)
    assert weights.sum().item() == pytest.approx(1)
    expected = float((weights * values).sum())
    assert run(values.tolist(), 32, sigma_rel) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_tends_to_the_continuous_average(sigma_rel: float) -> None:
    """∫ sin(3t) p(t) dt: the error of n steps is of the order 1/n (the value at a step's end)."""
    gamma = exponent_of(sigma_rel)
    t = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    exact = float(((gamma + 1) * t**gamma * torch.sin(3 * t)).mean())

    def error(steps: int) -> float:
        values = [math.sin(3 * (i + 1) / steps) for i in range(steps)]
        return abs(run(values, 16, sigma_rel) - exact)

    assert error(500) < 1.5 / 500
    assert error(250) / error(500) == pytest.approx(2, abs=0.1)


def test_does_not_depend_on_the_unit_of_a_step() -> None:
    values = [1.0, -2.0, 0.5, 3.0]
    assert run(values, 1, 0.2) == pytest.approx(run(values, 4096, 0.2), rel=1e-14)


def test_profiles_are_copies_in_the_layout_of_the_parameters() -> None:
    model = nn.Linear(3, 2)
    ema = PowerEMA(model, [0.05, 0.2])
    assert set(ema.profiles) == {"0.05", "0.2"}
    for profile in ema.profiles.values():
        assert {n: p.shape for n, p in profile.items()} == {"weight": (2, 3), "bias": (2,)}
        assert torch.equal(profile["weight"], model.weight)
        assert profile["weight"].data_ptr() != model.weight.data_ptr()
        assert not profile["weight"].requires_grad
    nn.init.zeros_(model.weight)
    ema.update(model, images_seen=100, images_step=1)
    narrow, wide = (ema.profiles[name]["weight"].abs().sum() for name in ("0.05", "0.2"))
    assert 0 < narrow < wide


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28, 1.0, math.nan])
def test_impossible_widths(sigma_rel: float) -> None:
    with pytest.raises(InvalidInputError, match=r"^sigma_rel = "):
        PowerEMA(nn.Linear(1, 1), [0.1, sigma_rel])


def walk(tracked: list[float]) -> tuple[PowerEMA, list[tuple[int, float]], list[torch.Tensor]]:
    """256 drifting, noisy weights over 400 steps; averages of them, and ten snapshots of two."""
    random = torch.Generator().manual_seed(0)
    model = nn.Linear(256, 1, bias=False).double()
    drift = torch.randn(1, 256, generator=random, dtype=torch.float64) / 100
    ema = PowerEMA(model, tracked)
    snapshots, averages = [], []
    for step in range(1, 401):
        noise = torch.randn(1, 256, generator=random, dtype=torch.float64) / 10
        with torch.no_grad():
            model.weight.add_(drift + noise)
        ema.update(model, images_seen=step * 8, images_step=8)
        if step % 40 == 0:
            for width in (0.05, 0.2):
                snapshots.append((step * 8, width))
                averages.append(ema.profiles[str(width)]["weight"].clone())
    return ema, snapshots, averages


@pytest.mark.parametrize("sigma_rel", [0.06, 0.1, 0.15, 0.2, 0.25])
def test_synthesis_is_near_the_average_tracked_all_along(sigma_rel: float) -> None:
    ema, snapshots, averages = walk([0.05, 0.2, sigma_rel])
    expected = ema.profiles[str(sigma_rel)]["weight"]
    weights = synthesis_weights(snapshots, 3200, sigma_rel)
    assert weights.sum() == pytest.approx(1, abs=0.01)
    found = sum(w * average for w, average in zip(weights.tolist(), averages, strict=True))
    assert (found - expected).norm() / expected.norm() < 0.01
    # What was tracked is found again exactly, and no tracked one would have done.
    if sigma_rel == 0.2:
        assert (found - expected).norm() / expected.norm() < 1e-9
    else:
        nearest = min((average - expected).norm() for average in averages)
        assert nearest > 2 * (found - expected).norm()


def test_synthesis_for_an_earlier_moment_uses_earlier_snapshots() -> None:
    _, snapshots, averages = walk([0.05, 0.2])
    weights = synthesis_weights(snapshots[:8], 1280, 0.05)
    assert weights == pytest.approx([0, 0, 0, 0, 0, 0, 1, 0], abs=1e-6)
    assert len(averages) == 20


def test_overlaps_are_the_integrals_they_stand_for() -> None:
    """Where one snapshot must do, its weight is ⟨p, wanted⟩ / ⟨p, p⟩: by quadrature."""
    t = (np.arange(4_000_000) + 0.5) * 200 / 4_000_000
    snapshot, wanted = (
        np.where(t < end, (g + 1) * t**g / end ** (g + 1), 0)
        for end, g in ((150.0, exponent_of(0.1)), (200.0, exponent_of(0.2)))
    )
    expected = (snapshot * wanted).sum() / (snapshot * snapshot).sum()
    assert synthesis_weights([(150, 0.1)], 200, 0.2) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize(
    ("snapshots", "problem"),
    [
        ([], "there are none"),
        ([(100, 0.1), (300, 0.1)], "more than images_seen = 200"),
        ([(100, 0.1), (100, 0.1)], "two are alike"),
        ([(100, 0.5)], "sigma_rel = 0.5"),
    ],
)
def test_impossible_syntheses(snapshots: list[tuple[int, float]], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        synthesis_weights(snapshots, 200, 0.1)
