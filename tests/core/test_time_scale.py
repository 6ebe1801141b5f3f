"""Slow time embeddings: closed forms, plain diffusers, float64 oracles, and a trained network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from facm_core.errors import InvalidInputError
from facm_core.jvp import chain_jvp
from facm_core.models.base import Condition, select_rows
from facm_core.models.experts import Experts
from facm_core.models.time_scale import (
    TimeFit,
    drop_fast_weights,
    fit_time_embedding,
    slow_time,
    time_profile,
)
from facm_core.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from facm_platform.training.parallel import Sharding
from tests.core.tiny import tiny, tiny_batch

RATES = [1000 * 10000 ** (-k / 16) for k in range(16)]
SLOW = [rate for rate in RATES if rate <= 20]


def test_features_are_the_slow_sinusoids() -> None:
    network = slow_time(tiny("wan", seed=1)).network
    t = torch.linspace(0, 2, 9)
    features = network.condition_embedder.timesteps_proj(1000 * (1 - t)).double()
    phases = (1 - t.double())[:, None] * torch.tensor(SLOW, dtype=torch.float64)
    zeros = torch.zeros(9, 16 - len(SLOW), dtype=torch.float64)
    expected = torch.cat([zeros, phases.cos(), zeros, phases.sin()], 1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_the_network_that_diffusers_builds_computes_the_same() -> None:
    own = tiny("wan", seed=1)
    names = own.state_dict().keys()
    model, (x, t, condition) = slow_time(copy.deepcopy(own)), tiny_batch("wan")
    assert model.state_dict().keys() == names
    expected = model(x, t, condition)
    assert relative(expected, own(x, t, condition)) > 0.01
    plain = copy.deepcopy(own)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x, t, condition), expected, rtol=1e-12, atol=1e-12)
    # Weights with fast sinusoids, into a slow network: its function is without them at once.
    model.load_state_dict(own.state_dict())
    torch.testing.assert_close(model(x, t, condition), expected, rtol=1e-12, atol=1e-12)
    drop_fast_weights(model)
    assert all(torch.equal(p, plain.state_dict()[n]) for n, p in model.state_dict().items())


# --- Chain-JVP ----------------------------------------------------------------------------------


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("experts", [False, True])
def test_chain_jvp_equals_the_oracle(experts: bool, recompute: bool, assert_same: Any) -> None:
    """Row by row with `torch.func.jvp` of the expert whose row it is; gradients, too."""
    one, two = slow_time(tiny("wan", seed=1)), slow_time(tiny("wan", seed=2))
    model = Experts(one, two, boundary=0.875) if experts else one
    x, t, condition = tiny_batch("wan")
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    value, tangent = chain_jvp(
        model, (x, t), (dx, torch.ones_like(t)), condition, recompute=recompute
    )
    rows = [one, two, two, two] if experts else [one] * 4  # t = 0.1, 0.5, 0.9, 1.7
    expected = [whole_jvp(m, x, t, dx, condition, i) for i, m in enumerate(rows)]
    want = torch.cat([v for v, _ in expected])
    assert relative(value, want) < 1e-10
    assert relative(tangent, torch.cat([d for _, d in expected])) < 1e-10
    got, wanted = (gradients(model, v.square().sum()) for v in (value, want))
    assert_same(got, wanted, 1e-9)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def whole_jvp(
    model: Any, x: Tensor, t: Tensor, dx: Tensor, condition: Condition, row: int
) -> tuple[Tensor, Tensor]:
    i = torch.tensor([row])
    given = select_rows(condition, i)
    with sdpa_kernel(SDPBackend.MATH):
        point, direction = (x[i], t[i]), (dx[i], torch.ones_like(t[i]))
        return torch.func.jvp(lambda x, t: model(x, t, given), point, direction)


# --- warm-up of a trained network ---------------------------------------------------------------


class Toy:
    """Four pictures, each with a prompt of its own and a little noise."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.pictures = self.normal(4, 4, 4, 4)
        self.prompts = self.normal(4, 5, 12)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def rows(self, n: int) -> tuple[Tensor, Condition]:
        which = torch.randint(4, (n,), generator=self.generator)
        x_1 = self.pictures[which] + 0.2 * self.normal(n, 4, 4, 4)
        return x_1, {"text_embedding": self.prompts[which]}


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def teacher(toy: Toy) -> Any:
    """A tiny Wan from diffusers' own start, after 400 steps of flow matching."""
    torch.manual_seed(0)
    model = tiny("wan", seed=0)
    model.network = WanTransformer3DModel(**model.network.config)
    objective = FlowMatching(FlowMatchingConfig(label_dropout=0.0))
    optimizer = torch.optim.Adam(model.float().parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 400)
    for _ in range(400):
        optimizer.zero_grad()
        objective(model, *toy.rows(32), generator=toy.generator).loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=[3.0, 20.0])
def fastest(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(scope="module")
def fitted(toy: Toy, teacher: Any, fastest: float) -> tuple[Any, TimeFit]:
    student = slow_time(copy.deepcopy(teacher).requires_grad_(), fastest)
    return student, fit_time_embedding(student, teacher, *toy.rows(64), steps=200)


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def test_the_function_stays_and_the_tangent_falls(
    fitted: tuple[Any, TimeFit], fastest: float
) -> None:
    """The default keeps the function as it is; where more is cut off, the fit mends the most."""
    _, fit = fitted
    of_teacher, before, after = fit.teacher, fit.before, fit.after
    assert of_teacher.embedding_error == 0 == max(of_teacher.velocity_error)
    gain = {3.0: 0.6, 20.0: 1.0}[fastest]
    assert after.embedding_error < gain * before.embedding_error
    assert mean(after.velocity_error) < gain * mean(before.velocity_error)
    assert mean(after.anchor_error) < gain * mean(before.anchor_error)
    small = {3.0: 0.15, 20.0: 0.04}[fastest]
    assert max(*after.velocity_error, *after.anchor_error) < small
    assert mean(of_teacher.tangent_rms) > 5 * mean(after.tangent_rms)
    assert mean(of_teacher.partial_rms) > 10 * mean(after.partial_rms)


def test_the_students_flow_is_as_good(toy: Toy, teacher: Any) -> None:
    """What counts in the end is the distance from data, not that from the teacher."""
    student = slow_time(copy.deepcopy(teacher))
    x_1, condition = toy.rows(2000)
    x_0, t = toy.normal(*x_1.shape), torch.rand(2000, generator=toy.generator)
    x_t = t.view(-1, 1, 1, 1) * x_1 + (1 - t.view(-1, 1, 1, 1)) * x_0
    with torch.no_grad():
        losses = [
            float((model(x_t, t, condition) - (x_1 - x_0)).square().mean())
            for model in (teacher, student)
        ]
    assert losses[1] < 1.01 * losses[0]


def test_only_the_slow_part_of_the_time_mlp_moves(
    teacher: Any, fitted: tuple[Any, TimeFit], fastest: float
) -> None:
    student, _ = fitted
    start = dict(slow_time(copy.deepcopy(teacher), fastest).named_parameters())
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, start[n])}
    mlp = "network.condition_embedder.time_embedder"
    assert moved == {f"{mlp}.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    weight = student.get_parameter(f"{mlp}.linear_1.weight").unflatten(1, (2, 16))
    assert (weight != 0).any(0).tolist() == [[rate <= fastest for rate in RATES]] * 2
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.usefixtures("float64")
def test_figures_are_those_of_finite_differences(toy: Toy, teacher: Any) -> None:
    """In float64, of a network and a teacher which differ."""
    teacher, student = copy.deepcopy(teacher).double(), tiny("wan", seed=1)
    x_1, condition = toy.rows(4)
    x_1, condition = x_1.double(), {n: c.double() for n, c in condition.items()}
    got = time_profile(student, teacher, x_1, condition, bins=3, seed=7)
    x_0 = torch.randn(x_1.shape, generator=torch.Generator().manual_seed(7)).double()
    assert got.times == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    h = 1e-7
    with torch.no_grad():
        for i, time in enumerate(got.times):
            x_t, t = time * x_1 + (1 - time) * x_0, torch.full((4,), time, dtype=torch.float64)
            v, anchor = teacher(x_t, t, condition), teacher(x_t, 2 - t, condition)
            assert got.velocity_error[i] == pytest.approx(relative(student(x_t, t, condition), v))
            own = student(x_t, 2 - t, condition)
            assert got.anchor_error[i] == pytest.approx(relative(own, anchor))
            for figure, dx in ((got.partial_rms[i], 0 * v), (got.tangent_rms[i], v)):
                ahead, behind = (student(x_t + s * dx, t + s, condition) for s in (h, -h))
                rms = ((ahead - behind) / (2 * h)).square().mean().sqrt()
                assert figure == pytest.approx(float(rms), rel=1e-5)


def test_what_slow_sinusoids_can_do_is_found(toy: Toy) -> None:
    """A teacher without fast ones: the fit of experts ends where both began."""
    teacher = Experts(*(slow_time(tiny("wan", seed=i).float()) for i in (1, 2)), boundary=0.875)
    student = copy.deepcopy(teacher)
    for embedder in student.time_embedders:
        for parameter in embedder.parameters():
            parameter.data += 0.02 * toy.normal(*parameter.shape) * (parameter != 0)
    fit = fit_time_embedding(student, teacher, *toy.rows(8), steps=300, times=256)
    assert fit.before.embedding_error > 0.02
    assert fit.after.embedding_error < 0.1 * fit.before.embedding_error
    assert max(fit.after.velocity_error) < 0.1 * max(fit.before.velocity_error)


# --- float32 in bfloat16 ------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    method = f"file://{tmp_path / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tangents", [False, True])
def test_times_are_embedded_in_float32(sharded: bool, tangents: bool) -> None:
    """Under bfloat16 weights, and under the training loop's mixed precision of FSDP2."""
    exact, (x, t, condition) = slow_time(tiny("wan", seed=1)).float(), tiny_batch("wan")
    x, t, condition = x.float(), t.float(), {n: c.float() for n, c in condition.items()}
    model = copy.deepcopy(exact)
    if sharded:
        model = Sharding(precision="bfloat16").apply(model, torch.device("cpu"))
    else:
        model = slow_time(copy.deepcopy(exact).bfloat16())
        assert model.network.dtype == torch.bfloat16
        # The values that bfloat16 would have rounded.
        for mine, its in zip(model.time_embedders, exact.time_embedders, strict=True):
            mine.load_state_dict(its.state_dict())
    seen: list[tuple[str, Tensor]] = []
    for m in (exact, model):
        (embedder,) = m.time_embedders
        embedder.linear_2.register_forward_hook(
            lambda linear, args, output: seen.append((linear.weight.dtype, output))
        )
    for m in (exact, model):
        if tangents:
            chain_jvp(m, (x, t), (torch.ones_like(x), torch.ones_like(t)), condition)
        else:
            m(x, t, condition)
    (_, expected), (dtype, got) = seen
    assert dtype == torch.float32
    lanes = [(got, expected)]
    if tangents:
        lanes = [
            tuple(getattr(y.lane(0), f) for y in (got, expected)) for f in ("value", "tangent")
        ]
    for mine, its in lanes:
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


# --- errors -------------------------------------------------------------------------------------


def test_bad_input(toy: Toy) -> None:
    with pytest.raises(InvalidInputError, match=r"fastest = 0.1: .* turns by 0.178 rad"):
        slow_time(tiny("wan", seed=1), fastest=0.1)
    with pytest.raises(InvalidInputError, match="model = 'SD3Adapter': holds no Wan network"):
        slow_time(tiny("sd3", seed=1))
    with pytest.raises(InvalidInputError, match="model = 'Linear': holds no Wan network"):
        drop_fast_weights(nn.Linear(1, 1))
    model = slow_time(tiny("wan", seed=1).float())
    with pytest.raises(InvalidInputError, match="steps = 0: below 1"):
        fit_time_embedding(model, model, *toy.rows(1), steps=0)
