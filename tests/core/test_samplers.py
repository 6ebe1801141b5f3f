"""Samplers on Gaussian data, whose flow is known in closed form.

Data N(m, s²): x_t ~ N(t·m, σ_t²) with σ_t² = t²s² + (1 − t)², the flow keeps (x − t·m)/σ_t, and
the velocity is its time derivative. Guidance between two such Gaussians with the same s is the
flow of a third, with m = m_u + w·(m_c − m_u).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.samplers import sample_consistency, sample_euler, sample_heun, sample_noise

S = 0.3
NULL = 0
MEANS = torch.tensor([-0.5, 1.0, 2.0], dtype=torch.float64)  # by label
SHAPE = (2, 3, 3)


def sigma(t: Any) -> Any:
    return (t**2 * S**2 + (1 - t) ** 2) ** 0.5


def flow(x: Tensor, t: float, t_next: float, mean: Tensor) -> Tensor:
    """Exact solution from t to t_next."""
    return t_next * mean + sigma(t_next) * (x - t * mean) / sigma(t)


class Gaussian:
    """The exact velocity, or the exact average velocity to t = 1; keeps what it was asked."""

    blocks = ()

    def __init__(self, *, average: bool = False, second_time: bool = False) -> None:
        self.average, self.second_time = average, second_time
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, r: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, condition, r))
        t = torch.where(t > 1, 2 - t, t).view(-1, 1, 1, 1)
        mean = MEANS[condition].view(-1, 1, 1, 1).to(x.dtype)
        if self.average:
            return (flow(x, t, 1, mean) - x) / (1 - t)
        return mean + (t * S**2 - (1 - t)) / sigma(t) ** 2 * (x - t * mean)

    def null_condition(self, condition: Tensor) -> Tensor:
        return torch.full_like(condition, NULL)

    def times(self) -> list[float]:
        return [float(t[0]) for _, t, _, _ in self.calls]


def noise(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return sample_noise(SHAPE, range(n)).to(dtype)


def labels(n: int) -> Tensor:
    return torch.arange(n) % 2 + 1


def mean_of(condition: Tensor) -> Tensor:
    return MEANS[condition].view(-1, 1, 1, 1)


Sampler = Callable[..., Tensor]
integrators = pytest.mark.parametrize("sampler", [sample_euler, sample_heun])


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_order_of_convergence(sampler: Sampler, order: int, shift: float) -> None:
    x_0, y = noise(4), labels(4)
    exact = mean_of(y) + S * x_0

    def error(steps: int) -> float:
        return float((sampler(Gaussian(), x_0, y, steps=steps, shift=shift) - exact).abs().max())

    assert math.log2(error(100) / error(200)) == pytest.approx(order, abs=0.1)
    assert error(200) < (0.05, 0.0005)[order - 1]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.0, 0.5)])
@integrators
def test_guidance_on_an_interval(sampler: Sampler, low: float, high: float) -> None:
    w, x_0, y = 1.75, noise(4), labels(4)
    m_c, m_u = mean_of(y), MEANS[NULL]
    exact = flow(x_0, 0.0, low, m_c)
    exact = flow(exact, low, high, m_u + w * (m_c - m_u))
    exact = flow(exact, high, 1.0, m_c)
    guidance = GuidanceConfig(scale=w, low=low, high=high)
    x = sampler(Gaussian(), x_0, y, steps=800, guidance=guidance)
    torch.testing.assert_close(x, exact, rtol=0, atol=0.01)
    unguided = sampler(Gaussian(), x_0, y, steps=800)
    assert (unguided - exact).abs().min() > 0.1


@pytest.mark.parametrize(("sampler", "calls_per_step"), [(sample_euler, 1), (sample_heun, 2)])
def test_function_evaluations(sampler: Sampler, calls_per_step: int) -> None:
    model = Gaussian()
    sampler(model, noise(3), labels(3), steps=8)
    assert [len(x) for x, _, _, _ in model.calls] == [3] * 8 * calls_per_step
    # Guidance: still one call, with unconditional rows where it is on, t = ¼ … ½.
    model = Gaussian()
    guidance = GuidanceConfig(scale=2.0, low=0.25, high=0.5)
    sampler(model, noise(3), labels(3), steps=8, guidance=guidance)
    assert len(model.calls) == 8 * calls_per_step
    assert all(len(x) == (6 if 0.25 <= t[0] <= 0.5 else 3) for x, t, _, _ in model.calls)


@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
def test_time_grid(shift: float) -> None:
    model = Gaussian()
    sample_euler(model, noise(1), labels(1), steps=4, shift=shift)
    expected = [shift * t / (1 + (shift - 1) * t) for t in (0.0, 0.25, 0.5, 0.75)]
    assert model.times() == pytest.approx(expected)
    model = Gaussian()
    sample_heun(model, noise(1), labels(1), steps=2, shift=shift)
    middle = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert model.times() == pytest.approx([0.0, middle, middle, 1.0])


@integrators
def test_expanded_asks_the_anchor_domain(sampler: Sampler) -> None:
    plain, expanded = Gaussian(), Gaussian()
    guidance = GuidanceConfig(scale=2.0, low=0.25, high=0.5)
    x = sampler(plain, noise(2), labels(2), steps=4, guidance=guidance)
    y = sampler(expanded, noise(2), labels(2), steps=4, guidance=guidance, expanded=True)
    assert expanded.times() == [2 - t for t in plain.times()]
    # The interval is one of t, not of what the network is told.
    torch.testing.assert_close(x, y)


@integrators
def test_second_time_of_the_flow_is_t(sampler: Sampler) -> None:
    model = Gaussian(second_time=True)
    sampler(model, noise(2), labels(2), steps=3, guidance=GuidanceConfig(scale=2.0))
    assert all(torch.equal(r, t) and len(r) == 4 for _, t, _, r in model.calls)
    model = Gaussian()
    sampler(model, noise(2), labels(2), steps=3)
    assert all(r is None for _, _, _, r in model.calls)


@pytest.mark.parametrize("second_time", [True, False])
def test_second_time_of_the_shortcut_is_one(second_time: bool) -> None:
    model = Gaussian(average=True, second_time=second_time)
    sample_consistency(model, noise(2), labels(2), steps=4, seeds=range(2))
    assert model.times() == [0.0, 0.25, 0.5, 0.75]
    for _, _, _, r in model.calls:
        assert (r is None) if not second_time else torch.equal(r, torch.ones(2).double())


def test_one_consistency_step_is_the_flow_map() -> None:
    x_0, y = noise(4), labels(4)
    x = sample_consistency(Gaussian(average=True), x_0, y, steps=1)
    torch.testing.assert_close(x, mean_of(y) + S * x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 0.3])
@pytest.mark.parametrize("steps", [2, 4])
def test_consistency_steps_one_by_one(steps: int, shift: float) -> None:
    """With known ε: to the data, back to t_i with new noise, and so on."""
    x_0, y = noise(4), labels(4)
    generator = torch.Generator().manual_seed(1)
    exact = mean_of(y) + S * x_0
    for i in range(1, steps):
        t = shift * i / (steps + (shift - 1) * i)
        epsilon = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        exact = flow(t * exact + (1 - t) * epsilon, t, 1.0, mean_of(y))
    model, generator = Gaussian(average=True), generator.manual_seed(1)
    got = sample_consistency(model, x_0, y, steps=steps, generator=generator, shift=shift)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_consistency_samples_have_the_distribution_of_the_data(steps: int) -> None:
    n = 3000
    y = torch.ones(n, dtype=torch.int64)
    x = sample_consistency(Gaussian(average=True), noise(n), y, steps=steps, seeds=range(n))
    values = n * math.prod(SHAPE)
    assert abs(x.mean() - MEANS[1]) < 4 * S / math.sqrt(values)
    assert abs(x.var() / S**2 - 1) < 4 * math.sqrt(2 / values)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_sample_depends_on_its_own_seed_only(steps: int) -> None:
    seeds, y, model = [3, 1, 4, 15, 9], labels(5), Gaussian(average=True)

    def sample(rows: list[int]) -> Tensor:
        own = [seeds[row] for row in rows]
        return sample_consistency(model, sample_noise(SHAPE, own), y[rows], steps=steps, seeds=own)

    whole = sample([0, 1, 2, 3, 4])
    assert torch.equal(torch.cat([sample([0, 1, 2]), sample([3]), sample([4])]), whole)
    assert torch.equal(sample([4, 2, 0]), whole[[4, 2, 0]])
    assert len({float(row.sum()) for row in whole}) == 5


def test_noise_of_a_seed() -> None:
    x = sample_noise(SHAPE, [7, 8, 7])
    assert x.shape == (3, *SHAPE)
    assert x.dtype == torch.float32
    assert torch.equal(x[0], x[2])
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(x, sample_noise(SHAPE, [7, 8, 7], stream=1))
    many = torch.stack([sample_noise(SHAPE, range(2000), stream=stream) for stream in (0, 1)])
    assert abs(many.mean()) < 4 / math.sqrt(many.numel())
    assert abs(many.var() - 1) < 4 * math.sqrt(2 / many.numel())
    # Streams and seeds do not run along each other.
    assert abs((many[0] * many[1]).mean()) < 4 / math.sqrt(many[0].numel())
    assert abs((many[0, 1:] * many[1, :-1]).mean()) < 4 / math.sqrt(many[0, 1:].numel())


@integrators
def test_the_network_sees_its_own_dtype_and_the_sum_is_float64(sampler: Sampler) -> None:
    model, x_0, y = Gaussian(), noise(2, torch.float32), labels(2)
    x = sampler(model, x_0, y, steps=100)
    assert {x.dtype, *(seen.dtype for call in model.calls for seen in call[:2])} == {torch.float32}
    exact = sampler(Gaussian(), x_0.double(), y, steps=100)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sampler", [sample_consistency, sample_euler, sample_heun])
def test_no_gradients(sampler: Sampler) -> None:
    x_0 = noise(2).requires_grad_()
    assert not sampler(Gaussian(), x_0.detach(), labels(2), steps=2).requires_grad
    with pytest.raises(InvalidInputError, match="steps = 0"):
        sampler(Gaussian(), x_0, labels(2), steps=0)


@pytest.mark.parametrize("sampler", [sample_consistency, sample_euler, sample_heun])
def test_bad_shift(sampler: Sampler) -> None:
    with pytest.raises(InvalidInputError, match="shift = 0"):
        sampler(Gaussian(), noise(1), labels(1), steps=2, shift=0.0)
