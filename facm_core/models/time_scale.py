"""Slow time embeddings for Wan: a network whose tangent in t is no larger than its function.

Wan embeds the timestep 1000·(1 − t) by sinusoids, which turn by 1000·ω_k radians per unit of t,
ω_k = 10000^(−k/K). The fast ones add little to a trained velocity F, and a thousand times that to
dF/dt; FACM clips its residual at 1, so that such a tangent leaves signs of noise. Published
remedies rescale the time input (SANA-Sprint, arXiv 2503.09641; arXiv 2512.13006) and embed it in
float32 (rCM, arXiv 2510.08431). Here the fast sinusoids are left out, which is a rescaled input
whose frequencies are the network's own: parameters keep their names and shapes, the slow ones
start from the teacher's values, and as the weights of the others are zero, the network that
diffusers builds from the same configuration computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facm_core.errors import require
from facm_core.interpolant import interpolate
from facm_core.jvp import chain_jvp
from facm_core.models.base import Condition, VelocityModel
from facm_core.models.lightning_dit import at_least_float32

M = TypeVar("M", bound=nn.Module)


class SlowTimesteps(nn.Module):
    """In the place of diffusers' `Timesteps`: its features (B, 2·K), the fast ones zero.

    Args:
        timesteps: The network's own; cosines of all frequencies, the fastest first, then sines.
        fast: How many frequencies are left out.
    """

    def __init__(self, timesteps: Any, fast: int) -> None:
        super().__init__()
        self.timesteps, self.fast = timesteps, fast
        self.num_channels = timesteps.num_channels

    def forward(self, timestep: Tensor) -> Tensor:
        """Features of timesteps (B,), in float32."""
        slow = self.timesteps(timestep).unflatten(-1, (2, -1))[..., self.fast :]
        return F.pad(slow, (self.fast, 0)).flatten(-2)


def slow_time(model: M, fastest: float = 20.0) -> M:
    """Let `model`, a Wan network, its adapter or experts, embed slow sinusoids only; in place.

    Its time MLP becomes float32, and its weights of the fast sinusoids zero. `fit_time_embedding`
    then makes up for them. State dicts are those of the network as it was; one that comes from a
    network with fast sinusoids needs `drop_fast_weights` afterwards.

    Args:
        model: Not sharded yet; usually a copy of the teacher.
        fastest: Sinusoids turn by at most so many radians per unit of t; Wan's own by 1,000.

    Raises:
        InvalidInputError: no Wan network, or no sinusoid that slow.
    """
    for embedder in _time_embeddings(model):
        timesteps = embedder.timesteps_proj
        count = timesteps.num_channels // 2
        rates = [1000 * 10000 ** (-k / count) for k in range(count)]
        fast = sum(rate > fastest for rate in rates)
        require(
            fast < count,
            "fastest",
            fastest,
            f"the slowest of {count} sinusoids turns by {rates[-1]:.3g} radians per unit of t",
            "Use e.g. 20",
        )
        embedder.timesteps_proj = SlowTimesteps(timesteps, fast)
        for parameter in embedder.time_embedder.parameters():
            parameter.data = at_least_float32(parameter.data)
    drop_fast_weights(model)
    return model


@torch.no_grad()
def drop_fast_weights(model: nn.Module) -> None:
    """Make zero what reads sinusoids that are left out: the same function, with or without them."""
    for embedder in _time_embeddings(model):
        if isinstance(embedder.timesteps_proj, SlowTimesteps):
            weight = embedder.time_embedder.linear_1.weight
            weight.unflatten(1, (2, -1))[..., : embedder.timesteps_proj.fast] = 0


# --- how far a student is from its teacher, and how steep ----------------------------------------


@dataclass(frozen=True, kw_only=True)
class TimeProfile:
    """A network beside its teacher, by time.

    Attributes:
        embedding_error: ‖e − e_teacher‖ / ‖e_teacher‖ of all that reads the time, over [0, 2].
        times: Of the following figures, each the middle of its bin of [0, 1].
        velocity_error: ‖F − v‖ / ‖v‖ where both are told t; v is the teacher's velocity.
        anchor_error: The same where both are told 2 − t.
        partial_rms: Root mean square of ∂F/∂t, value by value.
        tangent_rms: Of dF/dt along (v, 1), which FACM multiplies by 1 − t and clips at 1.
    """

    embedding_error: float
    times: tuple[float, ...]
    velocity_error: tuple[float, ...]
    anchor_error: tuple[float, ...]
    partial_rms: tuple[float, ...]
    tangent_rms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TimeFit:
    """The teacher's profile, and the student's before and after its warm-up."""

    teacher: TimeProfile
    before: TimeProfile
    after: TimeProfile


@torch.no_grad()
def time_profile(
    student: VelocityModel,
    teacher: VelocityModel,
    x_1: Tensor,
    condition: Condition,
    *,
    bins: int = 8,
    seed: int = 0,
) -> TimeProfile:
    """Measure `student` beside `teacher`, Wan networks, on data x_1 (B, …) with noise of `seed`."""
    x_0 = torch.randn(x_1.shape, generator=torch.Generator().manual_seed(seed)).to(x_1)
    times = tuple((i + 0.5) / bins for i in range(bins))
    figures = []
    for time in times:
        t = x_1.new_full((len(x_1),), time)
        x_t, one = interpolate(x_0, x_1, t), torch.ones_like(t)
        v, anchor = teacher(x_t, t, condition), teacher(x_t, 2 - t, condition)
        f, tangent = chain_jvp(student, (x_t, t), (v, one), condition)
        _, partial = chain_jvp(student, (x_t, t), (torch.zeros_like(v), one), condition)
        figures.append(
            (
                _relative_error([f], [v]),
                _relative_error([student(x_t, 2 - t, condition)], [anchor]),
                _rms(partial),
                _rms(tangent),
            )
        )
    velocity_error, anchor_error, partial_rms, tangent_rms = zip(*figures, strict=True)
    everywhere = torch.linspace(0, 2, 4001, device=x_1.device)
    return TimeProfile(
        embedding_error=_relative_error(*(_embed(m, everywhere) for m in (student, teacher))),
        times=times,
        velocity_error=velocity_error,
        anchor_error=anchor_error,
        partial_rms=partial_rms,
        tangent_rms=tangent_rms,
    )


# --- warm-up --------------------------------------------------------------------------------------


def fit_time_embedding(
    student: Any,
    teacher: Any,
    x_1: Tensor,
    condition: Condition,
    *,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    times: int = 1024,
    seed: int = 0,
) -> TimeFit:
    """Train the time MLPs of `student`, and nothing else, towards the teacher's embedding.

    Adam on the relative square of its error, at uniform times in [0, 2]: those in (1, 2] are
    timesteps in [−1000, 0), the anchor's. No data is needed but for the report.

    Args:
        student: After `slow_time`, with the teacher's weights otherwise; not sharded.
        teacher: Adapter, or experts like the student's.
        x_1: Data (B, …) of the report.
        condition: Conditioning of its rows.
        steps: Of Adam, the learning rate falling to zero by a cosine.
        learning_rate: Of the first step.
        times: Drawn for a step.
        seed: Of times, and of the report's noise.

    Raises:
        InvalidInputError: no step, or no Wan network.
    """
    require(steps >= 1, "steps", steps, "below 1", "Use e.g. 1000")
    of_teacher = time_profile(teacher, teacher, x_1, condition, seed=seed)
    before = time_profile(student, teacher, x_1, condition, seed=seed)
    parameters = [p for e in _time_embeddings(student) for p in e.time_embedder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        t = 2 * torch.rand(times, generator=generator).to(x_1.device)
        with torch.no_grad():
            wanted = _embed(teacher, t)
        loss = torch.stack(
            [
                (e - e_teacher).square().mean() / e_teacher.square().mean()
                for e, e_teacher in zip(_embed(student, t), wanted, strict=True)
            ]
        ).sum()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    after = time_profile(student, teacher, x_1, condition, seed=seed)
    return TimeFit(teacher=of_teacher, before=before, after=after)


def _time_embeddings(model: Any) -> list[Any]:
    """What embeds time in each Wan network of `model`, by diffusers' own class for it."""
    found = [m for m in model.modules() if type(m).__name__ == "WanTimeTextImageEmbedding"]
    require(
        bool(found),
        "model",
        type(model).__name__,
        "holds no Wan network",
        "Use a WanAdapter, or Experts of them",
    )
    return found


def _embed(model: Any, t: Tensor) -> list[Tensor]:
    """What each network's output layer reads of times t (B,), and what its blocks read."""
    read = []
    for embedder in _time_embeddings(model):
        mlp, project = embedder.time_embedder, embedder.time_proj
        features = embedder.timesteps_proj(1000 * (1 - t)).to(mlp.linear_1.weight.dtype)
        embedding = at_least_float32(mlp(features))
        weight, bias = (p.to(embedding.dtype) for p in (project.weight, project.bias))
        read += [embedding, F.linear(embedder.act_fn(embedding), weight, bias)]
    return read


def _relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all of them."""
    pairs = zip(got, expected, strict=True)
    difference = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return (difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
