"""What objectives and samplers expect of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from facm_core.errors import require

Condition: TypeAlias = Tensor | Mapping[str, Tensor]
"""Conditioning of B rows: labels (B,), or named tensors whose first dimension is B."""


class VelocityModel(Protocol):
    """A velocity network F(x, t, condition, r)."""

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The units of Chain-JVP and of sharding, in the order they run."""

    @property
    def time_embedders(self) -> Iterable[nn.Module]:
        """Modules that embed a time: computed in float32 whatever the rest is computed in."""

    @property
    def shared_parts(self) -> Iterable[nn.Module]:
        """Parts of blocks that are also called outside of them: units of sharding of their own."""

    @property
    def second_time(self) -> bool:
        """Whether the network reads r."""

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, H, W) at x (B, C, H, W), t (B,) in [0, 2]."""

    def null_condition(self, condition: Condition) -> Condition:
        """The unconditional counterpart of `condition`."""


def entries(condition: Condition) -> Mapping[str, Tensor]:
    """The named parts of a condition; a bare tensor is the labels."""
    return {"label": condition} if isinstance(condition, Tensor) else condition


def entry(condition: Condition, name: str) -> Tensor:
    """The part `name` of a condition.

    Raises:
        InvalidInputError: there is none.
    """
    found = entries(condition)
    require(
        name in found,
        f"condition.{name}",
        None,
        f"missing; the condition has {sorted(found)}",
        f"Use a latent set with {name}, or a network that does not read it",
    )
    return found[name]


def null_labels(condition: Condition, null_label: int) -> Condition:
    """`condition` with the null label in every row."""
    labels = torch.full_like(entry(condition, "label"), null_label)
    return labels if isinstance(condition, Tensor) else {**condition, "label": labels}


def select_rows(condition: Condition, rows: Tensor) -> Condition:
    """The given rows (index or mask) of a condition."""
    if isinstance(condition, Tensor):
        return condition[rows]
    return {name: value[rows] for name, value in condition.items()}


def concatenate(first: Condition, second: Condition) -> Condition:
    """Rows of two conditions of the same kind, one after the other."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {name: torch.cat([first[name], second[name]]) for name in first}
    raise TypeError(f"cannot concatenate {type(first).__name__} and {type(second).__name__}")


def where_rows(mask: Tensor, yes: Condition, no: Condition) -> Condition:
    """Row by row, `yes` where `mask` (B,) holds and `no` elsewhere."""
    if isinstance(yes, Tensor) and isinstance(no, Tensor):
        return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)
    if isinstance(yes, Mapping) and isinstance(no, Mapping):
        return {
            name: torch.where(mask.view(-1, *[1] * (yes[name].ndim - 1)), yes[name], no[name])
            for name in yes
        }
    raise TypeError(f"cannot mix {type(yes).__name__} and {type(no).__name__}")
