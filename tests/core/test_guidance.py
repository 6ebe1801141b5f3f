"""Guided velocities against the formula, and the rows that are paid for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig, guided_velocity
from facm_core.models import Condition

NULL = 9


class Counting:
    """F(x, t, y, r) = (y + 1)·x + t + 100·r; keeps every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Condition, Tensor | None]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None) -> Tensor:
        self.calls.append((x, t, condition, r))
        y = condition if isinstance(condition, Tensor) else condition["text"][:, 0]
        return field(x, t, y, torch.zeros_like(t) if r is None else r)

    def null_condition(self, condition: Condition) -> Condition:
        if isinstance(condition, Tensor):
            return torch.full_like(condition, NULL)
        return {name: torch.full_like(value, NULL) for name, value in condition.items()}


def field(x: Tensor, t: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (y + 1).view(-1, 1, 1, 1) * x + (t + 100 * r).view(-1, 1, 1, 1)


X = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
T = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 4])


def rows_seen(model: Counting) -> list[int]:
    return [len(x) for x, _, _, _ in model.calls]


@pytest.mark.parametrize("w", [0.0, 0.5, 1.75, 4.0])
@pytest.mark.parametrize("r", [None, 1 - T])
@pytest.mark.parametrize("guided", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
def test_formula_in_one_call(w: float, r: Tensor | None, guided: list[int]) -> None:
    model, mask = Counting(), torch.tensor(guided, dtype=torch.bool)
    v = guided_velocity(model, X, T, Y, w, mask, r=r)
    r_given = torch.zeros_like(T) if r is None else r
    v_c, v_u = field(X, T, Y, r_given), field(X, T, torch.full_like(Y, NULL), r_given)
    expected = torch.where(mask.view(-1, 1, 1, 1), v_u + w * (v_c - v_u), v_c)
    torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-13)
    # One call, and an unconditional row for each guided row only.
    assert rows_seen(model) == [5 + sum(guided)]
    _, time, condition, _ = model.calls[0]
    assert condition[5:].tolist() == [NULL] * sum(guided)
    assert torch.equal(time[5:], T[mask])


@pytest.mark.parametrize("guided", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
def test_a_known_conditional_velocity_is_not_asked_for(guided: list[int]) -> None:
    model, mask = Counting(), torch.tensor(guided, dtype=torch.bool)
    known = torch.randn_like(X)
    v = guided_velocity(model, X, T, Y, 1.75, mask, v_c=known)
    v_u = field(X, T, torch.full_like(Y, NULL), torch.zeros_like(T))
    expected = torch.where(mask.view(-1, 1, 1, 1), v_u + 1.75 * (known - v_u), known)
    torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-13)
    # A sharded network must be called on every rank, so no guided row still costs one.
    assert rows_seen(model) == [max(1, sum(guided))]
    assert set(model.calls[0][2].tolist()) == {NULL}


def test_no_scale_no_call() -> None:
    model, known = Counting(), torch.randn_like(X)
    v = guided_velocity(model, X, T, Y, 1.0, GuidanceConfig(scale=1.0).rows(T), v_c=known)
    assert torch.equal(v, known)
    assert model.calls == []


def test_mapping_conditions() -> None:
    """Named tensors of several widths, as for text."""
    text = Y.double()[:, None].expand(5, 3)
    condition = {"text": text, "mask": torch.ones(5, 7, dtype=torch.bool)}
    mask = T >= 0.5
    model = Counting()
    v = guided_velocity(model, X, T, condition, 2.0, mask)
    torch.testing.assert_close(v, guided_velocity(Counting(), X, T, Y, 2.0, mask))
    seen = model.calls[0][2]
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "text": (8, 3),
        "mask": (8, 7),
    }


def test_interval_includes_its_ends() -> None:
    guidance = GuidanceConfig(scale=2.0, low=0.2, high=0.8)
    assert guidance.rows(T).tolist() == [False, True, True, True, False]
    assert not GuidanceConfig(scale=1.0, low=0.2, high=0.8).rows(T).any()
    assert GuidanceConfig(scale=2.0).rows(T).all()


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("scale", {"scale": -1.0}),
        ("scale", {"scale": math.nan}),
        ("low", {"low": -0.1}),
        ("low", {"low": 0.6, "high": 0.5}),
        ("low", {"high": 1.1}),
    ],
)
def test_bad_settings_are_named(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        GuidanceConfig(**settings)
