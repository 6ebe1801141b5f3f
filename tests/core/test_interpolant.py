"""The interpolant against autograd and its own ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from facm_core.interpolant import conditional_velocity, interpolate, per_sample, predict_data


@pytest.fixture(params=[(4, 3), (4, 3, 2, 2), (4, 2, 3, 2, 2)], ids=["vector", "image", "video"])
def ends(request: pytest.FixtureRequest) -> Tensor:
    """x_0 and x_1."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *request.param, generator=generator, dtype=torch.float64)


T = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)


def test_velocity_is_the_derivative(ends: Tensor) -> None:
    x_0, x_1 = ends
    _, dx_dt = torch.func.jvp(lambda t: interpolate(x_0, x_1, t), (T,), (torch.ones_like(T),))
    torch.testing.assert_close(conditional_velocity(x_0, x_1), dx_dt, rtol=1e-15, atol=1e-15)
    h = 1e-4
    difference = (interpolate(x_0, x_1, T + h) - interpolate(x_0, x_1, T - h)) / (2 * h)
    torch.testing.assert_close(conditional_velocity(x_0, x_1), difference, rtol=1e-9, atol=1e-9)


def test_noise_at_zero_and_data_at_one(ends: Tensor) -> None:
    x_0, x_1 = ends
    x_t = interpolate(x_0, x_1, T)
    assert torch.equal(x_t[0], x_0[0])
    assert torch.equal(x_t[3], x_1[3])
    torch.testing.assert_close(x_t[1], 0.3 * x_1[1] + 0.7 * x_0[1])


def test_the_average_velocity_leads_to_the_data(ends: Tensor) -> None:
    """The velocity of a straight path is its own average, from every time."""
    x_0, x_1 = ends
    got = predict_data(interpolate(x_0, x_1, T), T, x_1 - x_0)
    torch.testing.assert_close(got, x_1, rtol=1e-14, atol=1e-14)
    moved = predict_data(x_0, T, torch.ones_like(x_0)) - x_0
    torch.testing.assert_close(moved.flatten(1)[:, 0], 1 - T)


def test_times_are_per_sample(ends: Tensor) -> None:
    assert per_sample(T, ends[0]).shape == (4, *[1] * (ends[0].ndim - 1))
