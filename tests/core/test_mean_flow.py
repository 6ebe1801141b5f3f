"""MeanFlow against the paper's formulas (`oracles.MeanFlowOracle`) and a flow in closed form."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.objectives import MeanFlow, MeanFlowConfig
from facm_core.times import TimesConfig
from tests.core.oracles import GaussianFlow, MeanFlowOracle, loss_and_gradients, values_kept

R = torch.tensor([0.5, 0.4, 1.0, 0.995, 0.06, 0.9], dtype=torch.float64)  # two rows have r = t


def config(w: float = 1.75, **settings: Any) -> MeanFlowConfig:
    return MeanFlowConfig(guidance=GuidanceConfig(scale=w, low=0.125), **settings)


@pytest.fixture(scope="module")
def batch(make_batch: Any) -> dict[str, Tensor]:
    return make_batch() | {"r": R}


@pytest.mark.parametrize(
    ("teacher_second_time", "w"), list(product([None, False, True], [1.0, 1.75]))
)
def test_loss_and_gradients_equal_the_whole_model_oracle(
    teacher_second_time: bool | None,
    w: float,
    make_model: Any,
    batch: dict[str, Tensor],
    assert_same: Any,
) -> None:
    student, teacher = make_model(seed=1, second_time=True), None
    if teacher_second_time is not None:
        teacher = make_model(seed=2, second_time=teacher_second_time)
    expected_loss, expected = MeanFlowOracle(w=w, p=0.75)(student, teacher, batch)
    for recompute in (False, True):
        objective = MeanFlow(config(w, p=0.75), recompute=recompute)
        loss, gradients, _ = loss_and_gradients(objective, student, teacher, batch)
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert_same(gradients, expected, 1e-9)


@pytest.mark.parametrize("settings", [{}, {"p": 0.0}, {"p": 0.5, "c": 10.0}])
def test_settings_reach_the_formula(
    settings: dict[str, float], make_model: Any, batch: dict[str, Tensor], assert_same: Any
) -> None:
    student = make_model(seed=1, second_time=True)
    expected_loss, expected = MeanFlowOracle(**settings)(student, None, batch)
    objective = MeanFlow(config(1.0, **settings))
    loss, gradients, _ = loss_and_gradients(objective, student, None, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert_same(gradients, expected, 1e-9)


@pytest.mark.parametrize(
    "wrong", [{"p": 1.0}, {"c": 1.0}, {"low": 0.0}, {"high": 0.5}, {"w": 1.5}, {"null_label": 4}]
)
def test_the_oracle_notices(
    wrong: dict[str, Any], make_model: Any, batch: dict[str, Tensor]
) -> None:
    """Each ingredient moves the loss by far more than the tolerance above."""
    student, right = make_model(seed=1, second_time=True), {"w": 1.75, "p": 0.75}
    loss, _ = MeanFlowOracle(**right)(student, None, batch)
    other, _ = MeanFlowOracle(**right | wrong)(student, None, batch)
    assert abs(other / loss - 1) > 1e-5


def test_a_sample_by_hand() -> None:
    """u = 8t + 2r: at t = ¼, r = ¾ and v = 0, u = 3.5 and its target is ½·8, for 4 values."""

    class Ramp(torch.nn.Module):
        blocks, second_time = (), True

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, r: Tensor) -> Tensor:
            return (8 * t + 2 * r).view(-1, 1, 1, 1).expand_as(x)

        def null_condition(self, condition: Tensor) -> Tensor:
            return condition

    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    t, r = torch.tensor([0.25]), torch.tensor([0.75])
    output = MeanFlow(config(1.0))(Ramp(), x, torch.zeros(1), x_0=x, t=t, r=r)
    assert output.loss.item() == pytest.approx(1 / 1.001, rel=1e-12)
    assert output.metrics["loss_mse"] == pytest.approx(0.25, rel=1e-12)
    assert output.metrics["tangent_rms"] == 8


def gaussian_batch() -> dict[str, Tensor]:
    x_1, x_0 = torch.randn(2, 6, 2, 3, 3, generator=torch.Generator().manual_seed(5)).double()
    t = torch.tensor([0.0, 0.3, 0.5, 0.6, 0.2, 1.0], dtype=torch.float64)
    r = torch.tensor([1.0, 0.7, 0.5, 1.0, 0.4, 1.0], dtype=torch.float64)
    return {"x_1": x_1, "condition": torch.zeros(6), "x_0": x_0, "t": t, "r": r}


def test_the_closed_form_is_the_average_velocity() -> None:
    """(r − t)·u is how far the velocity u(x, t, t) carries x from t to r (Runge–Kutta)."""
    flow, batch = GaussianFlow(mean=0.7, std=0.4), gaussian_batch()
    x, r, steps = batch["x_1"], batch["r"], 200
    t, dt = batch["t"], (r - batch["t"]) / steps
    wide = dt.view(-1, 1, 1, 1)
    with torch.no_grad():
        u = flow(x, t, None, r)
        for _ in range(steps):
            k_1 = flow(x, t, None, t)
            k_2 = flow(x + wide / 2 * k_1, t + dt / 2, None, t + dt / 2)
            k_3 = flow(x + wide / 2 * k_2, t + dt / 2, None, t + dt / 2)
            k_4 = flow(x + wide * k_3, t + dt, None, t + dt)
            x, t = x + wide / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4), t + dt
    carried = (r - batch["t"]).view(-1, 1, 1, 1) * u
    torch.testing.assert_close(x - batch["x_1"], carried, rtol=1e-8, atol=1e-9)


def test_the_true_average_velocity_is_a_fixed_point() -> None:
    batch, objective = gaussian_batch(), MeanFlow(config(1.0))
    true = GaussianFlow(mean=0.7, std=0.4)
    loss, _, metrics = loss_and_gradients(objective, true, true, batch)
    assert metrics["loss_mse"] < 1e-25
    assert loss < 1e-20
    assert metrics["tangent_rms"] > 0.1  # the two terms cancel, neither is zero
    other = GaussianFlow(mean=0.7, std=0.6)
    assert loss_and_gradients(objective, other, true, batch)[2]["loss_mse"] > 1e-3


def test_training_finds_the_average_velocity() -> None:
    """From a wrong start, given nothing but the velocity: an error of sign would drive it away."""
    true, student = GaussianFlow(mean=0.7, std=0.4), GaussianFlow(mean=0.0, std=1.0)
    objective, batch = MeanFlow(config(1.0, p=0.0)), gaussian_batch()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for _ in range(200):
        loss_and_gradients(objective, student, true, batch)
        optimizer.step()
    assert student.mean.item() == pytest.approx(0.7, abs=1e-2)
    assert student.std.item() == pytest.approx(0.4, abs=1e-2)


def test_recomputing_keeps_less(make_model: Any, batch: dict[str, Tensor]) -> None:
    student = make_model(seed=1, second_time=True)
    kept, recomputed = (
        values_kept(MeanFlow(config(1.0), recompute=recompute), student, batch)
        for recompute in (False, True)
    )
    assert recomputed < kept / 2


def test_an_r_before_t_counts_as_t(make_model: Any, batch: dict[str, Tensor]) -> None:
    student, objective = make_model(seed=1, second_time=True), MeanFlow(config())
    before = loss_and_gradients(objective, student, None, batch | {"r": batch["t"] / 2})
    same = loss_and_gradients(objective, student, None, batch | {"r": batch["t"]})
    assert before[0] == same[0]


def test_a_student_without_a_second_time_is_refused(
    make_model: Any, batch: dict[str, Tensor]
) -> None:
    with pytest.raises(InvalidInputError, match=r"^second_time = False: .* second_time = True"):
        MeanFlow(config())(make_model(), batch["x_1"], batch["condition"])


def test_draws_come_from_the_generator_unless_given(make_model: Any, make_batch: Any) -> None:
    student, batch = make_model(seed=1, second_time=True), make_batch()
    objective = MeanFlow(config(label_dropout=0.5, interval_share=0.5))
    x_1, condition = batch["x_1"], batch["condition"]

    def loss(seed: int, **given: Tensor) -> float:
        generator = torch.Generator().manual_seed(seed)
        return objective(student, x_1, condition, generator=generator, **given).loss.item()

    assert loss(0) == loss(0) != loss(1)
    given = objective.draw(tuple(x_1.shape), torch.Generator().manual_seed(0)).given()
    assert given.keys() == {"x_0", "t", "dropped", "r"}
    assert loss(7, **given) == loss(0)
    for name in given:  # each of the four is used
        others = {key: value for key, value in given.items() if key != name}
        assert loss(7, **others) != loss(0), name


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_statistics_of_the_draws(share: float) -> None:
    """t is the earlier of two times, r the later one in the given share of rows, t elsewhere."""
    n = 100_000
    settings = config(interval_share=share, label_dropout=0.5)
    draws = MeanFlow(settings).draw((n, 1), torch.Generator().manual_seed(0))
    is_interval = draws.r > draws.t
    assert torch.all(draws.r >= draws.t)
    assert_rate(is_interval, share)
    assert_rate(draws.dropped, 0.5)
    assert_rate(draws.dropped[is_interval], 0.5)

    def normal(t: Tensor) -> Tensor:
        """Times that were drawn one by one would be standard normal in here."""
        return torch.logit(t.double()) - 0.4

    # One of two normals is below 0 with probability ¾ if it is the smaller one, else ¼.
    assert_rate(normal(draws.t) < 0, 3 / 4)
    assert_rate(normal(draws.t[is_interval]) < 0, 3 / 4)
    assert_rate(normal(draws.r[is_interval]) < 0, 1 / 4)
    # Half of their difference and half of their sum have variance ½ each.
    pair = normal(draws.t[is_interval]) + normal(draws.r[is_interval])
    if share > 0:
        assert abs((pair / 2).std() - math.sqrt(1 / 2)) < 4 * math.sqrt(1 / 4 / len(pair))


def assert_rate(rows: Tensor, expected: float) -> None:
    """Within 4 standard deviations."""
    if len(rows) > 0:
        deviation = math.sqrt(expected * (1 - expected) / len(rows))
        assert abs(rows.double().mean() - expected) <= 4 * deviation


def test_rows_of_the_draws_are_those_of_the_batch() -> None:
    draws = MeanFlow(config(interval_share=0.5)).draw((8, 2), torch.Generator().manual_seed(0))
    part = draws[2::3]
    for name in ("x_0", "t", "dropped", "r"):
        assert torch.equal(getattr(part, name), getattr(draws, name)[[2, 5]])


def test_defaults_are_those_of_the_paper() -> None:
    paper = MeanFlowConfig()
    assert (paper.interval_share, paper.p, paper.c, paper.label_dropout) == (0.25, 1.0, 1e-3, 0.1)
    assert paper.guidance == GuidanceConfig(scale=1.0)
    assert paper.times == TimesConfig(kind="logit_normal", mean=0.4, std=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval_share", -0.1),
        ("interval_share", 1.1),
        ("p", -1.0),
        ("p", math.nan),
        ("p", math.inf),
        ("c", 0.0),
        ("label_dropout", 1.0),
        ("label_dropout", -0.1),
    ],
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        MeanFlowConfig(**{field: value})
