"""What objectives share: random draws, the target velocity, the result, losses on velocities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from facm_core.errors import require
from facm_core.guidance import GuidanceConfig, guided_velocity
from facm_core.interpolant import conditional_velocity
from facm_core.models.base import Condition, VelocityModel, where_rows
from facm_core.times import TimeDistribution


@dataclass(frozen=True, kw_only=True)
class ObjectiveOutput:
    """Result of one evaluation.

    Attributes:
        loss: Scalar with graph.
        metrics: Detached scalar tensors, by name.
        rows: Detached values of each row, (B,), by name; its time is ``t``.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    rows: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Every random number one step needs.

    Attributes:
        x_0: Noise, like the data (B, …).
        t: Times, (B,).
        dropped: Rows whose condition is replaced by the null condition, boolean (B,).
        r: Second times, (B,), for an objective on intervals [t, r].
        mirrored: Rows that are told 2 − t instead of t, boolean (B,), for flow matching on both
            domains.
    """

    x_0: Tensor
    t: Tensor
    dropped: Tensor
    r: Tensor | None = None
    mirrored: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that the objective asks for, as arguments of its call."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __getitem__(self, rows: slice) -> Draws:
        """The draws of some rows of the batch."""
        return Draws(**{name: value[rows] for name, value in self.given().items()})

    def to(self, device: torch.device) -> Draws:
        """The same numbers on `device`."""
        return Draws(**{name: value.to(device) for name, value in self.given().items()})


class Objective(Protocol):
    """A loss over a velocity network."""

    def draw(self, shape: tuple[int, ...], generator: Generator | None = None) -> Draws:
        """Random draws for data of `shape` (B, …), on the generator's device."""

    def __call__(self, *args: Any, **kwargs: Any) -> ObjectiveOutput:
        """The loss of (student, x_1, condition, teacher=None, *, generator=None, images_seen=0).

        Any of the draws can be given by its name in `Draws`; the others come from `generator`.
        """


def draw(
    shape: tuple[int, ...],
    times: TimeDistribution,
    label_dropout: float,
    generator: Generator | None = None,
) -> Draws:
    """Draw noise, times and label dropout for data of `shape`, on the generator's device."""
    device = generator.device if generator is not None else torch.device("cpu")
    return Draws(
        x_0=torch.randn(shape, generator=generator, device=device),
        t=times.sample(shape[0], generator=generator, device=device),
        dropped=torch.rand(shape[0], generator=generator, device=device) < label_dropout,
    )


def complete(drawn: Draws, x_1: Tensor, **given: Tensor | None) -> Draws:
    """Given draws win over drawn ones; times and noise like the data x_1, masks on its device."""
    values = drawn.given() | {name: value for name, value in given.items() if value is not None}
    return Draws(
        **{
            name: value.to(x_1.device if value.dtype == torch.bool else x_1)
            for name, value in values.items()
        }
    )


def drop_condition(model: VelocityModel, condition: Condition, dropped: Tensor) -> Condition:
    """The null condition in the dropped rows."""
    return where_rows(dropped, model.null_condition(condition), condition)


@torch.no_grad()
def target_velocity(
    student: VelocityModel,
    teacher: VelocityModel | None,
    guidance: GuidanceConfig,
    x_t: Tensor,
    x_1: Tensor,
    condition: Condition,
    draws: Draws,
    instantaneous: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Velocity v at (x_t, t) that the student is to follow, guided except in dropped rows.

    Args:
        student: Network under training.
        teacher: Frozen velocity network; without one, v_c is x_1 − x_0 and v_u the student's own.
        guidance: Scale and interval.
        x_t: Points, (B, …).
        x_1: Data, (B, …).
        condition: Conditioning of the B rows, null in the dropped ones.
        draws: Noise, times and dropped rows.
        instantaneous: (time, r) that tell the student to give an instantaneous velocity, each
            (B,); the average velocity of a shortcut would be no v_u.

    Returns:
        Velocity without graph, like x_1.
    """
    t = draws.t
    guided = guidance.rows(t) & ~draws.dropped
    if teacher is not None:
        r = t if teacher.second_time else None
        v = guided_velocity(teacher, x_t, t, condition, guidance.scale, guided, r=r)
    else:
        time, r = instantaneous
        v_c = conditional_velocity(draws.x_0, x_1)
        v = guided_velocity(student, x_t, time, condition, guidance.scale, guided, r=r, v_c=v_c)
    return v.to(x_1.dtype)


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """mean((F − v)²), a scalar."""
    return (prediction - target).square().mean()


@torch.no_grad()
def row_errors(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_square` and `cosine_distance` of each row, (B,) and (B,), without graph."""
    square = (prediction - target).square().flatten(1).mean(1)
    if prediction.shape[1] == 1:
        prediction, target = prediction.flatten(1), target.flatten(1)
    cosine = 1 - F.cosine_similarity(prediction, target, dim=1)
    return square, cosine.reshape(len(cosine), -1).mean(1)


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """mean(1 − cos(F, v)) with the cosine over channels (dimension 1), a scalar.

    Over one channel a cosine is only a sign, so there it is taken over all of a sample's values.
    """
    if prediction.shape[1] == 1:
        prediction, target = prediction.flatten(1), target.flatten(1)
    return (1 - F.cosine_similarity(prediction, target, dim=1)).mean()


def require_label_dropout(label_dropout: float) -> None:
    """Raise `InvalidInputError` unless it is a probability below 1."""
    require(
        0 <= label_dropout < 1,
        "label_dropout",
        label_dropout,
        "not a probability below 1",
        "Use e.g. 0.1",
    )
