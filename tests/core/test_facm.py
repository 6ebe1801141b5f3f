"""FACM against the paper's formulas, written out in `conftest.FACMOracle`."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.objectives import FACM, FACMConfig
from facm_core.objectives.facm import alpha, beta, consistency_residual
from facm_core.times import TimesConfig


def config(w: float = 1.75, **settings: Any) -> FACMConfig:
    return FACMConfig(guidance=GuidanceConfig(scale=w, low=0.125), **settings)


def loss_and_gradients(
    objective: FACM, student: Any, teacher: Any, batch: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    student.zero_grad()
    given = dict(batch)
    output = objective(student, given.pop("x_1"), given.pop("condition"), teacher, **given)
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.requires_grad}
    return output.loss.item(), gradients, output.metrics


CASES = list(product(["expanded", "auxiliary"], [None, False, True], [1.0, 1.75], [1, 3]))


@pytest.mark.parametrize(("conditioning", "teacher_second_time", "w", "channels"), CASES)
def test_loss_and_gradients_equal_the_whole_model_oracle(
    conditioning: str,
    teacher_second_time: bool | None,
    w: float,
    channels: int,
    make_model: Any,
    make_batch: Any,
    facm_oracle: Any,
    assert_same: Any,
) -> None:
    auxiliary = conditioning == "auxiliary"
    student = make_model(seed=1, second_time=auxiliary, in_channels=channels)
    teacher = None
    if teacher_second_time is not None:
        teacher = make_model(seed=2, second_time=teacher_second_time, in_channels=channels)
    batch = make_batch(channels)
    oracle = facm_oracle(auxiliary=auxiliary, w=w, lambda_cm=0.7, lambda_fm=1.3)
    expected_loss, expected = oracle(student, teacher, batch)

    settings = config(w, conditioning=conditioning, lambda_cm=0.7, lambda_fm=1.3)
    for recompute in (False, True):
        objective = FACM(settings, recompute=recompute)
        loss, gradients, metrics = loss_and_gradients(objective, student, teacher, batch)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert_same(gradients, expected, 1e-9)
        assert 0 < metrics["clipped_share"] < 1  # both sides of the clip were compared
        assert metrics["loss_cm"] * 0.7 + metrics["loss_fm"] * 1.3 == pytest.approx(loss)
        assert not any(value.requires_grad for value in metrics.values())


def test_named_labels_are_labels(make_model: Any, make_batch: Any, assert_same: Any) -> None:
    """With rows whose condition is dropped, and guided ones."""
    student, teacher, batch = make_model(seed=1), make_model(seed=2), make_batch()
    assert 0 < batch["dropped"].sum() < len(batch["dropped"])
    objective = FACM(config())
    loss, gradients, _ = loss_and_gradients(objective, student, teacher, batch)
    named = {**batch, "condition": {"label": batch["condition"]}}
    named_loss, named_gradients, _ = loss_and_gradients(objective, student, teacher, named)
    assert named_loss == loss
    assert_same(named_gradients, gradients, 1e-12)


@pytest.mark.parametrize(
    "wrong",
    [{"clip": math.inf}, {"p": 1.0}, {"c": 1e-2}, {"low": 0.0}, {"w": 1.5}, {"null_label": 4}],
)
def test_the_oracle_notices(
    wrong: dict[str, Any], make_model: Any, make_batch: Any, facm_oracle: Any
) -> None:
    """Each ingredient moves the loss by far more than the tolerance above."""
    student, batch = make_model(seed=1), make_batch()
    right, _ = facm_oracle(w=1.75)(student, None, batch)
    other, _ = facm_oracle(**{"w": 1.75} | wrong)(student, None, batch)
    assert abs(other / right - 1) > 1e-4


@pytest.mark.parametrize("settings", [{"p": 2.0, "c": 0.1}, {"lambda_cm": 0.0}, {"lambda_fm": 0.0}])
def test_settings_reach_the_formula(
    settings: dict[str, float], make_model: Any, make_batch: Any, facm_oracle: Any, assert_same: Any
) -> None:
    student, teacher, batch = make_model(seed=1), make_model(seed=2), make_batch()
    expected_loss, expected = facm_oracle(w=1.75, **settings)(student, teacher, batch)
    objective = FACM(config(**settings))
    loss, gradients, _ = loss_and_gradients(objective, student, teacher, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert_same(gradients, expected, 1e-9)


def test_the_interval_has_two_ends(make_model: Any, make_batch: Any, facm_oracle: Any) -> None:
    student, teacher, batch = make_model(seed=1), make_model(seed=2), make_batch()
    expected, _ = facm_oracle(w=1.75, low=0.1, high=0.4)(student, teacher, batch)
    objective = FACM(FACMConfig(guidance=GuidanceConfig(scale=1.75, low=0.1, high=0.4)))
    loss, _, _ = loss_and_gradients(objective, student, teacher, batch)
    assert loss == pytest.approx(expected, rel=1e-9)


def test_a_sample_by_hand() -> None:
    """F = 8t: at t = 3/4 and v = 0, g = 6 − ¼·8 = 4 is clipped to 1 and e = α²."""

    class Ramp(torch.nn.Module):
        blocks, second_time = (), False

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, r: None = None) -> Tensor:
            return (8 * t).view(-1, 1, 1, 1).expand_as(x)

        def null_condition(self, condition: Tensor) -> Tensor:
            return condition

    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    objective = FACM(config(1.0, label_dropout=0.0, lambda_fm=0.0))
    output = objective(Ramp(), x, torch.zeros(1), x_0=x, t=torch.tensor([0.75]))
    e = (1 - math.sqrt(0.75)) ** 2
    expected = math.cos(3 * math.pi / 8) * e / math.sqrt(e + 1e-3)
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert output.metrics["clipped_share"] == 1
    assert output.metrics["tangent_rms"] == 8


def test_alpha_and_beta_at_known_points() -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(alpha(t, 0.5), t.new_tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(alpha(t, 2.0), t.new_tensor([1.0, 0.9375, 0.0]))
    t = torch.tensor([0.0, 0.5, 2 / 3, 1.0], dtype=torch.float64)
    expected = t.new_tensor([1.0, math.sqrt(0.5), 0.5, 0.0])
    torch.testing.assert_close(beta(t), expected, rtol=1e-15, atol=1e-15)


def test_the_average_velocity_tends_to_v() -> None:
    """v̄ = F − g; its distance from v is (1 − t)·|dF/dt|, so nothing is left of it at t = 1."""
    f, v, df_dt = torch.randn(3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    t = torch.tensor([0.0, 0.9, 0.999, 1.0], dtype=torch.float64)
    distance = (f - consistency_residual(f, v, df_dt, t) - v).flatten(1).norm(dim=1)
    expected = df_dt.flatten(1).norm(dim=1) * t.new_tensor([1.0, 0.1, 0.001, 0.0])
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("conditioning", "second_time"), [("expanded", True), ("auxiliary", False)]
)
def test_a_student_that_does_not_fit_is_refused(
    conditioning: str, second_time: bool, make_model: Any, make_batch: Any
) -> None:
    student, batch = make_model(second_time=second_time), make_batch()
    objective = FACM(config(conditioning=conditioning))
    with pytest.raises(InvalidInputError, match=f"conditioning = '{conditioning}'"):
        objective(student, batch["x_1"], batch["condition"])


def test_draws_come_from_the_generator_unless_given(make_model: Any, make_batch: Any) -> None:
    student, batch, objective = make_model(seed=1), make_batch(), FACM(config(label_dropout=0.5))
    x_1, condition = batch["x_1"], batch["condition"]

    def loss(seed: int, **given: Tensor) -> float:
        generator = torch.Generator().manual_seed(seed)
        return objective(student, x_1, condition, generator=generator, **given).loss.item()

    assert loss(0) == loss(0) != loss(1)
    draws = objective.draw(tuple(x_1.shape), torch.Generator().manual_seed(0))
    given = {"x_0": draws.x_0, "t": draws.t, "dropped": draws.dropped}
    assert loss(7, **given) == loss(0)
    for name in given:  # each of the three is used
        others = {key: value for key, value in given.items() if key != name}
        assert loss(7, **others) != loss(0), name


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_label_dropout_rate(rate: float) -> None:
    n = 100_000
    draws = FACM(config(label_dropout=rate)).draw((n, 1), torch.Generator().manual_seed(0))
    deviation = math.sqrt(rate * (1 - rate) / n)
    assert abs(draws.dropped.double().mean() - rate) <= 4 * deviation
    assert abs(draws.x_0.mean()) < 4 / math.sqrt(n)
    assert abs(draws.x_0.var() - 1) < 4 * math.sqrt(2 / n)


def test_rows_of_the_draws_are_those_of_the_batch() -> None:
    draws = FACM(config(label_dropout=0.5)).draw((8, 2), torch.Generator().manual_seed(0))
    part = draws[2::3]
    for name in ("x_0", "t", "dropped"):
        assert torch.equal(getattr(part, name), getattr(draws, name)[[2, 5]])


def test_defaults_are_those_of_the_paper() -> None:
    paper = FACMConfig()
    assert (paper.lambda_cm, paper.lambda_fm, paper.p, paper.c) == (1.0, 1.0, 0.5, 1e-3)
    assert (paper.conditioning, paper.label_dropout) == ("expanded", 0.1)
    assert paper.guidance == GuidanceConfig(scale=1.75, low=0.125, high=1.0)
    assert paper.times == TimesConfig(kind="arctan_lognormal", mean=0.8, std=1.6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lambda_cm", -1.0),
        ("lambda_fm", math.nan),
        ("lambda_fm", math.inf),
        ("p", 0.0),
        ("c", 0.0),
        ("conditioning", "extended"),
        ("label_dropout", 1.0),
        ("label_dropout", -0.1),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        FACMConfig(**{field: value})
