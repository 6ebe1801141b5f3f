"""sCM against its formulas (`oracles.SCMOracle`), TrigFlow itself and a flow in closed form."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.jvp import chain_jvp
from facm_core.objectives import SCM, SCMConfig
from facm_core.objectives.scm import LogWeight, tangent, warmup
from facm_core.times import TimesConfig
from tests.core.conftest import ask
from tests.core.oracles import GaussianFlow, SCMOracle, loss_and_gradients, values_kept


def build(w: float = 1.0, recompute: bool = False, **settings: Any) -> SCM:
    """In float64, with a weight that depends on time."""
    config = SCMConfig(guidance=GuidanceConfig(scale=w, low=0.125), **settings)
    objective = SCM(config, recompute=recompute).double()
    torch.nn.init.normal_(
        objective.log_weight.weight, std=0.1, generator=torch.Generator().manual_seed(3)
    )
    return objective


CASES = [(None, 1.0), *product([False, True], [1.0, 1.75])]


@pytest.mark.parametrize("second_time", [False, True])
@pytest.mark.parametrize(("teacher_second_time", "w"), CASES)
def test_loss_and_gradients_equal_the_whole_model_oracle(
    teacher_second_time: bool | None,
    w: float,
    second_time: bool,
    make_model: Any,
    make_batch: Any,
    assert_same: Any,
) -> None:
    student, teacher = make_model(seed=1, second_time=second_time), None
    if teacher_second_time is not None:
        teacher = make_model(seed=2, second_time=teacher_second_time)
    batch, a = make_batch(), dict(build().named_parameters())
    expected_loss, expected = SCMOracle(w=w, warm=0.25)(student, teacher, batch, **a)
    for recompute in (False, True):
        objective = build(w, recompute, warmup_images=400)
        loss, gradients, metrics = loss_and_gradients(
            objective, student, teacher, batch, images_seen=100
        )
        assert loss == pytest.approx(expected_loss, rel=1e-9)
        assert_same(gradients, expected, 1e-9)
        assert metrics["tangent_warmup"] == 0.25


@pytest.mark.parametrize(
    ("settings", "images_seen", "same"),
    [
        ({"c": 2.0, "warmup_images": 0}, 0, {"c": 2.0}),
        ({"warmup_images": 400}, 0, {"warm": 0.0}),
        ({"warmup_images": 400}, 1000, {"warm": 1.0}),
    ],
)
def test_settings_reach_the_formula(
    settings: dict[str, Any],
    images_seen: int,
    same: dict[str, float],
    make_model: Any,
    make_batch: Any,
    assert_same: Any,
) -> None:
    student, objective, batch = make_model(seed=1), build(**settings), make_batch()
    a = dict(objective.named_parameters())
    expected_loss, expected = SCMOracle(**same)(student, None, batch, **a)
    loss, gradients, _ = loss_and_gradients(
        objective, student, None, batch, images_seen=images_seen
    )
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert_same(gradients, expected, 1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"warm": 0.2}, {"c": 0.2}, {"r": 0.9}, {"low": 0.5}, {"w": 1.5}, {"null_label": 4}],
)
def test_the_oracle_notices(
    wrong: dict[str, Any], make_model: Any, make_batch: Any, assert_same: Any
) -> None:
    """Each ingredient moves the gradients by far more than the tolerance above."""
    student, teacher = make_model(seed=1, second_time=True), make_model(seed=2)
    batch, a, right = make_batch(), dict(build().named_parameters()), {"w": 1.75, "warm": 0.25}
    _, gradients = SCMOracle(**right)(student, teacher, batch, **a)
    _, others = SCMOracle(**right | wrong)(student, teacher, batch, **a)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(others, gradients, 1e-3)


def test_a_sample_by_hand() -> None:
    """F = 8t: at t = ¾ and v = 0, g = ¾·√(⅝)·(−6 + ¼·8) in each of 4 values, and w(t) = 0.3."""

    class Ramp(torch.nn.Module):
        blocks, second_time = (), False

        def forward(self, x: Tensor, t: Tensor, condition: Tensor, r: None = None) -> Tensor:
            return (8 * t).view(-1, 1, 1, 1).expand_as(x)

        def null_condition(self, condition: Tensor) -> Tensor:
            return condition

    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    objective = SCM(SCMConfig(warmup_images=0)).double()
    with torch.no_grad():
        objective.log_weight.weight[0] = 0.3
    output = objective(Ramp(), x, torch.zeros(1), x_0=x, t=torch.tensor([0.75]))
    norm = 2 * 0.75 * math.sqrt(0.625) * 4
    expected = math.exp(0.3) * (norm / (norm + 0.1)) ** 2 / 4 - 0.3
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)
    assert output.metrics["tangent_norm"] == pytest.approx(norm, rel=1e-12)
    assert output.metrics["log_weight"] == pytest.approx(0.3, rel=1e-12)


def test_the_tangent_is_that_of_trigflow(make_model: Any) -> None:
    """g = −cos θ·df/dθ by finite differences along x_θ = cos θ·x_1 + sin θ·x_0 (paper, section 4).

    And F that grows by δ lowers the paper's network (cos θ·x_θ − f)/sin θ by n·δ.
    """
    model = make_model(seed=1)
    x_1, x_0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    label, delta = torch.tensor(2), 0.1

    def at(theta: float) -> tuple[Tensor, Tensor, float]:
        """Consistency function, the paper's network after F grew by δ less before, and n."""
        point = math.cos(theta) * x_1 + math.sin(theta) * x_0
        n = 1 / (math.cos(theta) + math.sin(theta))
        t = math.cos(theta) * n
        F = ask(model, point * n, torch.tensor(t, dtype=torch.float64), label, None)
        f, f_grown = (point * n + (1 - t) * value for value in (F, F + delta))
        before, after = ((math.cos(theta) * point - y) / math.sin(theta) for y in (f, f_grown))
        return f, after - before, n

    for t in (0.05, 0.3, 0.5, 0.9, 0.99):
        theta, h = math.atan2(1 - t, t), 1e-5
        with torch.no_grad():
            df_dtheta = (at(theta + h)[0] - at(theta - h)[0]) / (2 * h)
            _, change, n = at(theta)
        assert n == pytest.approx(math.hypot(t, 1 - t))
        torch.testing.assert_close(change, torch.full_like(change, -n * delta))

        time, v = torch.tensor([t], dtype=torch.float64), (x_1 - x_0)[None]
        x_t = (t * x_1 + (1 - t) * x_0)[None]
        F, dF_dt = chain_jvp(model, (x_t, time), (v, torch.ones_like(time)), label[None])
        g = tangent(F.detach(), v, dF_dt, time, 1.0)[0]
        torch.testing.assert_close(g, -math.cos(theta) * df_dtheta, rtol=1e-6, atol=1e-7)


def gaussian_batch() -> dict[str, Tensor]:
    x_1, x_0 = torch.randn(2, 6, 2, 3, 3, generator=torch.Generator().manual_seed(5)).double()
    t = torch.tensor([0.0, 0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    return {"x_1": x_1, "condition": torch.zeros(6), "x_0": x_0, "t": t}


def test_the_true_consistency_function_is_a_fixed_point() -> None:
    batch, objective = gaussian_batch(), SCM(SCMConfig(warmup_images=0)).double()
    true = GaussianFlow(mean=0.7, std=0.4)
    student = GaussianFlow(mean=0.7, std=0.4, second_time=False)
    loss, gradients, metrics = loss_and_gradients(objective, student, true, batch)
    assert metrics["tangent_norm"] < 1e-12
    assert loss == pytest.approx(0, abs=1e-20)
    assert max(abs(gradients["mean"]), abs(gradients["std"])) < 1e-12
    # Not so during the warm-up, nor for another function.
    warming = SCM(SCMConfig(warmup_images=2)).double()
    assert loss_and_gradients(warming, student, true, batch)[2]["tangent_norm"] > 1e-2
    other = GaussianFlow(mean=0.7, std=0.6, second_time=False)
    assert loss_and_gradients(objective, other, true, batch)[2]["tangent_norm"] > 1e-2


def test_training_finds_the_consistency_function_and_the_weight() -> None:
    """From a wrong start, given nothing but the velocity: an error of sign would drive it away.

    As the squared error falls below 1, its weight e^w = 1/error rises above that.
    """
    objective, batch = SCM(SCMConfig(warmup_images=0)).double(), gaussian_batch()
    true, student = (GaussianFlow(0.7, 0.4), GaussianFlow(0.0, 1.0, second_time=False))
    parameters = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for _ in range(300):
        loss_and_gradients(objective, student, true, batch)
        optimizer.step()
        scheduler.step()
    assert student.mean.item() == pytest.approx(0.7, abs=1e-2)
    assert student.std.item() == pytest.approx(0.4, abs=1e-2)
    assert torch.all(objective.log_weight(batch["t"]) > 0)


def test_a_tangent_of_any_size_is_at_most_one_long(make_model: Any, make_batch: Any) -> None:
    """With w = 0 the loss is ‖ĝ‖²/D, ‖ĝ‖ = ‖g‖/(‖g‖ + 0.1): over all D values of a sample."""
    student, objective = make_model(seed=1), SCM(SCMConfig(warmup_images=0)).double()
    batch = make_batch() | {"dropped": torch.zeros(6, dtype=torch.bool)}
    for size in (1e-9, 1.0, 1e9):
        with torch.no_grad():
            for parameter in student.final_layer.linear.parameters():
                parameter.normal_(std=size, generator=torch.Generator().manual_seed(0))
        for i in range(6):
            row = {name: value[i : i + 1] for name, value in batch.items()}
            loss, _, metrics = loss_and_gradients(objective, student, None, row)
            norm = metrics["tangent_norm"].item()
            assert loss == pytest.approx((norm / (norm + 0.1)) ** 2 / 48, rel=1e-6)
        assert norm > size / 10


def test_recomputing_keeps_less(make_model: Any, make_batch: Any) -> None:
    student, batch = make_model(seed=1), make_batch()
    kept, recomputed = (
        values_kept(build(recompute=recompute), student, batch) for recompute in (False, True)
    )
    assert recomputed < kept / 2


def test_warmup_values() -> None:
    values = [(0, 100, 0.0), (25, 100, 0.25), (100, 100, 1.0), (250, 100, 1.0), (0, 0, 1.0)]
    for images_seen, warmup_images, expected in values:
        assert warmup(images_seen, warmup_images) == expected


def test_the_weight_is_a_cosine_series() -> None:
    weight, t = LogWeight().double(), torch.tensor([0.0, 0.1, 1 / 3, 1.0], dtype=torch.float64)
    assert torch.equal(weight(t), torch.zeros(4, dtype=torch.float64))
    with torch.no_grad():
        weight.weight[0], weight.weight[3] = 0.5, 2.0
    expected = [0.5 + 2 * math.cos(3 * math.pi * time) for time in t]
    torch.testing.assert_close(weight(t), t.new_tensor(expected))
    assert weight.float()(t.float()).dtype == torch.float32


def test_guidance_needs_a_teacher(make_model: Any, make_batch: Any) -> None:
    student, batch = make_model(seed=1), make_batch()
    with pytest.raises(InvalidInputError, match=r"^guidance.scale = 1.75: .* Use 1, or a teacher"):
        build(1.75)(student, batch["x_1"], batch["condition"])


def test_draws_come_from_the_generator_unless_given(make_model: Any, make_batch: Any) -> None:
    student, batch, objective = make_model(seed=1), make_batch(), build(label_dropout=0.5)
    x_1, condition = batch["x_1"], batch["condition"]

    def loss(seed: int, **given: Tensor) -> float:
        generator = torch.Generator().manual_seed(seed)
        return objective(student, x_1, condition, generator=generator, **given).loss.item()

    assert loss(0) == loss(0) != loss(1)
    draws = objective.draw(tuple(x_1.shape), torch.Generator().manual_seed(0))
    given = {"x_0": draws.x_0, "t": draws.t, "dropped": draws.dropped}
    assert draws.r is None
    assert loss(7, **given) == loss(0)
    for name in given:  # each of the three is used
        others = {key: value for key, value in given.items() if key != name}
        assert loss(7, **others) != loss(0), name


def test_defaults_are_those_of_the_paper() -> None:
    paper = SCMConfig()
    assert (paper.warmup_images, paper.c, paper.label_dropout) == (20_480_000, 0.1, 0.1)
    assert paper.guidance == GuidanceConfig(scale=1.0)
    assert paper.times == TimesConfig(kind="logit_normal", mean=0.8 - math.log(2), std=1.6)


def test_default_times_have_the_noise_of_the_paper() -> None:
    """τ = log(σ_d·(1 − t)/t) ~ N(−0.8, 1.6²) with σ_d = ½."""
    n = 100_000
    t = SCM(SCMConfig()).draw((n, 1), torch.Generator().manual_seed(0)).t.double()
    tau = torch.log(0.5 * (1 - t) / t)
    assert abs(tau.mean() + 0.8) < 4 * 1.6 / math.sqrt(n)
    assert abs(tau.std() - 1.6) < 4 * 1.6 / math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("field", "value"),
    [("warmup_images", -1), ("c", 0.0), ("label_dropout", 1.0), ("label_dropout", -0.1)],
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        SCMConfig(**{field: value})
