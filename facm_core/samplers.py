"""Samplers. Every sample has its own seed, so results depend on neither batch nor world size.

Sampling arithmetic is float64 outside the network, which sees its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Generator, Tensor

from facm_core.errors import require
from facm_core.guidance import GuidanceConfig, guided_velocity
from facm_core.interpolant import predict_data
from facm_core.models.base import Condition, VelocityModel

Field = Callable[[Tensor, Tensor], Tensor]


def sample_noise(shape: Sequence[int], seeds: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, row i from seeds[i] alone.

    Args:
        shape: Shape of one sample.
        seeds: One seed a sample, B of them, each from 0.
        stream: Independent draws for one seed: 0 for the initial noise, i for step i.
    """
    rows = [np.random.default_rng((seed, stream)).standard_normal(shape) for seed in seeds]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


@torch.no_grad()
def sample_consistency(
    model: VelocityModel,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    seeds: Sequence[int] | None = None,
    generator: Generator | None = None,
    shift: float = 1.0,
) -> Tensor:
    """Multi-step consistency sampling (FACM, arXiv 2507.03738).

    At t_i = i/n, shifted: x̂ = x + (1 − t_i)·F(x, t_i), then x = t_{i+1}·x̂ + (1 − t_{i+1})·ε.

    Args:
        model: Student; one with a second time is told r = 1.
        noise: Initial noise (B, C, H, W).
        condition: Conditioning of the B rows.
        steps: n, the number of function evaluations.
        seeds: One seed a sample for ε; or
        generator: source of ε for the whole batch, on the noise's device.
        shift: Time shift, as for `sample_euler`.

    Returns:
        Samples like `noise`.
    """
    x = noise.double()
    for i, (now, t_next) in enumerate(pairwise(time_grid(steps, shift).tolist())):
        t = torch.full((len(x),), now, dtype=noise.dtype, device=noise.device)
        r = torch.ones_like(t) if model.second_time else None
        f = model(x.to(noise.dtype), t, condition, r).double()
        x = predict_data(x, t.double(), f)
        if i + 1 < steps:
            if seeds is not None:
                epsilon = sample_noise(noise.shape[1:], seeds, stream=i + 1).to(noise)
            else:
                epsilon = torch.randn(
                    noise.shape, generator=generator, device=noise.device, dtype=noise.dtype
                )
            x = t_next * x + (1 - t_next) * epsilon.double()
    return x.to(noise.dtype)


def sample_euler(
    model: VelocityModel,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    guidance: GuidanceConfig | None = None,
    shift: float = 1.0,
    expanded: bool = False,
) -> Tensor:
    """Integrate the flow dx/dt = v(x, t) from noise to data with Euler's method.

    Args:
        model: Velocity network.
        noise: Initial noise (B, C, H, W).
        condition: Conditioning of the B rows.
        steps: Number of steps, which is the number of function evaluations.
        guidance: Classifier-free guidance, None for the conditional velocity.
        shift: Time shift s: t -> s·t / (1 + (s − 1)·t); below 1, more steps near noise.
        expanded: Ask the network at 2 − t: the flow that a FACM student keeps as its anchor.

    Returns:
        Samples like `noise`.
    """
    field = _field(model, condition, guidance or GuidanceConfig(), noise.dtype, expanded)
    times = time_grid(steps, shift)
    x = noise.double()
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * field(x, t)
    return x.to(noise.dtype)


def sample_heun(
    model: VelocityModel,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int,
    guidance: GuidanceConfig | None = None,
    shift: float = 1.0,
    expanded: bool = False,
) -> Tensor:
    """Integrate the flow with Heun's method: second order, 2·steps function evaluations.

    Arguments and result as for `sample_euler`.
    """
    field = _field(model, condition, guidance or GuidanceConfig(), noise.dtype, expanded)
    times = time_grid(steps, shift)
    x = noise.double()
    for t, t_next in pairwise(times):
        v = field(x, t)
        v_next = field(x + (t_next - t) * v, t_next)
        x = x + (t_next - t) * (v + v_next) / 2
    return x.to(noise.dtype)


def _field(
    model: VelocityModel,
    condition: Condition,
    guidance: GuidanceConfig,
    dtype: torch.dtype,
    expanded: bool,
) -> Field:
    """(x float64 (B, …), t float64 scalar) -> velocity float64."""

    @torch.no_grad()
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t_rows = t.to(device=x.device, dtype=dtype).expand(len(x))
        return guided_velocity(
            model,
            x.to(dtype),
            2 - t_rows if expanded else t_rows,
            condition,
            guidance.scale,
            guidance.rows(t_rows),
            r=t_rows if model.second_time else None,
        ).double()

    return velocity


def time_grid(steps: int, shift: float) -> Tensor:
    """(steps + 1,) float64 times from 0 to 1: t_i = i/n, shifted as `sample_euler` says."""
    require(steps >= 1, "steps", steps, "below 1", "Use a whole number from 1")
    require(shift > 0, "shift", shift, "not positive", "Use 1 for an even grid")
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)
