"""Chain-JVP against the whole network at once: `torch.func.jvp`, and finite differences."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from facm_core.errors import InvalidInputError
from facm_core.jvp import TangentError, anchored_jvp, attention, chain_jvp
from facm_core.models import LightningDiT

both_modes = pytest.mark.parametrize("recompute", [False, True], ids=["recorded", "recomputed"])

GENERATOR = torch.Generator().manual_seed(5)
X, DX = torch.randn(2, 4, 3, 4, 4, generator=GENERATOR, dtype=torch.float64)
T, DT = torch.tensor([[0.1, 0.5, 0.9, 1.7], [1.0, -1.0, 0.3, 2.0]], dtype=torch.float64)
Y = torch.tensor([0, 3, 5, 2])


def call(model: nn.Module, recompute: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return chain_jvp(model, (X, T), (DX, DT), Y, recompute=recompute, **kwargs)


def second_time(model: LightningDiT) -> dict[str, Tensor]:
    return {"r": torch.ones_like(T)} if model.second_time else {}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter that takes part, and of nothing twice: they start from zero."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[False, True], ids=["t", "t+r"])
def model(request: pytest.FixtureRequest, make_model: Any) -> LightningDiT:
    return make_model(seed=3, second_time=request.param)


@both_modes
def test_equals_the_whole_model(model: LightningDiT, recompute: bool, assert_same: Any) -> None:
    r = second_time(model)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(lambda x, t: model(x, t, Y, **r), (X, T), (DX, DT))
    value, tangent = call(model, recompute, **r)
    torch.testing.assert_close(value, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tangent, expected[1], rtol=1e-10, atol=1e-12)
    assert not tangent.requires_grad
    # A loss that uses the tangent as a constant, as FACM's does.
    weights = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=X.dtype)
    got = gradients(model, (value * weights + value.square() * tangent).sum())
    loss = (expected[0] * weights + expected[0].square() * expected[1].detach()).sum()
    assert_same(got, gradients(model, loss), 1e-10)


@both_modes
def test_equals_finite_differences(model: LightningDiT, recompute: bool) -> None:
    r, h = second_time(model), 1e-5
    with torch.no_grad():
        ahead, behind = (model(X + s * DX, T + s * DT, Y, **r) for s in (h, -h))
    _, tangent = call(model, recompute, **r)
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


@both_modes
def test_gradients_reach_the_inputs(make_model: Any, recompute: bool) -> None:
    model, x = make_model(seed=3), X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x, T, Y).square().sum(), x)[0]
    value, tangent = chain_jvp(model, (x, T), (DX, DT), Y, recompute=recompute)
    torch.testing.assert_close(torch.autograd.grad(value.square().sum(), x)[0], expected)
    assert not tangent.requires_grad


@both_modes
def test_without_gradients(make_model: Any, recompute: bool) -> None:
    model = make_model(seed=3)
    with torch.no_grad():
        value, tangent = call(model, recompute)
    assert not value.requires_grad
    for got, expected in zip((value, tangent), call(model), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-12)


@both_modes
def test_a_last_layer_of_zeros_has_a_tangent_of_zeros(make_model: Any, recompute: bool) -> None:
    model = make_model(seed=3)
    nn.init.zeros_(model.final_layer.linear.weight)
    _, tangent = call(model, recompute)
    assert torch.equal(tangent, torch.zeros_like(X))
    assert gradients(model, call(model, recompute)[0].sum()).keys() >= {"final_layer.linear.weight"}


@both_modes
def test_frozen_first_layers(make_model: Any, recompute: bool, assert_same: Any) -> None:
    """Fine-tuning the last layer only: the blocks before it want no gradient."""
    model = make_model(seed=3).requires_grad_(False)
    model.final_layer.requires_grad_()
    expected = gradients(model, model(X, T, Y).square().sum())
    assert len(expected) == 5
    assert_same(gradients(model, call(model, recompute)[0].square().sum()), expected, 1e-10)


def state(model: nn.Module) -> list[Any]:
    """What the JVP changes for the time of a call: its code, its compiled code and its hooks."""
    return [
        (
            vars(module).get("forward"),
            module._compiled_call_impl,
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks),
        )
        for module in model.modules()
    ]


both_builds = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def compile_blocks(model: Any, backend: str = "eager") -> None:
    for block in model.blocks:
        block.compile(backend=backend)


@both_modes
@both_builds
def test_the_network_is_left_as_it_was(make_model: Any, compiled: bool, recompute: bool) -> None:
    model = make_model(seed=3)
    before = model(X, T, Y)
    if compiled:
        compile_blocks(model)
    own = state(model)
    expected = call(model, recompute)
    assert state(model) == own

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        call(model, recompute)
    handle.remove()
    assert state(model) == own
    assert torch.equal(model(X, T, Y), before)
    assert all(map(torch.equal, call(model, recompute), expected))


@both_modes
def test_a_block_with_a_forward_of_its_own_keeps_it(
    make_model: Any, recompute: bool, assert_same: Any
) -> None:
    """Some libraries put their wrapper on the instance (``block.forward = …``)."""
    model = make_model(seed=3)
    block = model.blocks[0]
    plain: Callable[..., Tensor] = block.forward
    block.forward = lambda *args: 2 * plain(*args)
    expected = model(X, T, Y)
    expected_gradients = gradients(model, expected.square().sum())
    value, _ = call(model, recompute)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    got = gradients(model, value.square().sum())
    assert torch.equal(model(X, T, Y), expected)
    assert_same(got, expected_gradients, 1e-10)


@both_modes
def test_a_shared_block(make_model: Any, recompute: bool, assert_same: Any) -> None:
    model = make_model(seed=3)
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    expected, own = gradients(model, model(X, T, Y).square().sum()), state(model)
    assert_same(gradients(model, call(model, recompute)[0].square().sum()), expected, 1e-10)
    assert state(model) == own


@pytest.mark.parametrize(("dx", "dt", "name"), [(DX[:3], DT, "dx"), (DX, DT[:, None], "dt")])
def test_a_tangent_of_another_shape_is_refused(
    dx: Tensor, dt: Tensor, name: str, make_model: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name} = .* one tangent per value"):
        chain_jvp(make_model(), (X, T), (dx, dt), Y)


@both_modes
def test_an_anchor_is_a_second_call(model: LightningDiT, recompute: bool, assert_same: Any) -> None:
    r, at_r = ([torch.ones_like(T)], [T]) if model.second_time else ([], [])
    expected = (model(2 * X, 2 - T, Y, *at_r), *chain_jvp(model, (X, T), (DX, DT), Y, *r))
    loss = expected[0].square().sum() + (expected[1] * expected[2]).sum()
    expected_gradients = gradients(model, loss)
    got = anchored_jvp(
        model, (2 * X, 2 - T, Y, *at_r), (X, T), (DX, DT), Y, *r, recompute=recompute
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not got[2].requires_grad
    loss = got[0].square().sum() + (got[1] * got[2]).sum()
    assert_same(gradients(model, loss), expected_gradients, 1e-10)


@both_modes
def test_an_anchor_with_another_condition(make_model: Any, recompute: bool) -> None:
    model, null = make_model(seed=3), torch.full_like(Y, 5)
    anchor, value, tangent = anchored_jvp(
        model, (X, T, null), (X, T), (DX, DT), Y, recompute=recompute
    )
    torch.testing.assert_close(anchor, model(X, T, null), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((value, tangent), call(model), rtol=1e-12, atol=1e-12)


@both_modes
def test_what_depends_on_no_input_is_differentiated_once(recompute: bool, assert_same: Any) -> None:
    """A block that gives something of its own beside the tokens, in a call with an anchor."""
    model = SmallNet(2.0)
    block = model.blocks[0]
    block.forward = lambda x, t: (x * t, block.linear.weight.exp())

    def forward(x: Tensor, t: Tensor) -> Tensor:
        y, weight = block(x, t.view(-1, 1, 1, 1))
        return y @ weight

    model.forward = forward
    expected = gradients(model, model(2 * X, T).sum() + model(X, T).square().sum())
    anchor, value, _ = anchored_jvp(model, (2 * X, T), (X, T), (DX, DT), recompute=recompute)
    assert_same(gradients(model, anchor.sum() + value.square().sum()), expected, 1e-10)


@both_modes
def test_gradients_add_up_over_calls(make_model: Any, recompute: bool, assert_same: Any) -> None:
    model = make_model(seed=3)
    expected = gradients(model, model(X, T, Y).sum() + model(X, 2 - T, Y).square().sum())
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    model.zero_grad()
    first, _ = call(model, recompute)
    second, _ = chain_jvp(model, (X, 2 - T), (DX, DT), Y, recompute=recompute)
    second.square().sum().backward()
    first.sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(got, expected, 1e-10)


class SmallBlock(nn.Module):
    """What it computes depends on a plain attribute and on its mode."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.act = nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = self.factor if self.training else -1.0
        return x + scale * F.silu(self.act(self.linear(x)) * t)


class SmallNet(nn.Module):
    """One block per factor."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.blocks = nn.ModuleList(map(SmallBlock, factors))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x: Tensor, t: Tensor, _: Any = None) -> Tensor:
        x, t = self.first(x), t.view(-1, 1, 1, 1)
        for block in self.blocks:
            x = block(x, t)
        return x


@pytest.fixture
def graphs() -> Callable[[], int]:
    """Counts the graphs that were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compare(model: nn.Module, eager: nn.Module, recompute: bool, assert_same: Any) -> None:
    """Value, tangent and gradients of a network and of what it was made from."""
    got, expected = call(model, recompute), call(eager, recompute)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    losses = [(value.square() + value * tangent).sum() for value, tangent in (got, expected)]
    mine, its = (gradients(m, loss) for m, loss in zip((model, eager), losses, strict=True))
    assert_same({n.replace("_orig_mod.", ""): g for n, g in mine.items()}, its, 1e-10)


@both_modes
def test_compiled_blocks(
    recompute: bool, make_model: Any, graphs: Callable[[], int], assert_same: Any
) -> None:
    eager, model = make_model(seed=3), make_model(seed=3)
    compile_blocks(model, "aot_eager")
    compare(model, eager, recompute, assert_same)
    seen = graphs()
    assert seen > 0
    compare(model, eager, recompute, assert_same)
    assert graphs() == seen, "compiled again"


@both_modes
def test_blocks_of_one_build_share_their_graphs(
    recompute: bool, graphs: Callable[[], int], assert_same: Any
) -> None:
    def needed(*factors: float) -> int:
        before, model = graphs(), SmallNet(*factors)
        compile_blocks(model)
        compare(model, SmallNet(*factors), recompute, assert_same)
        return graphs() - before

    one = needed(2.0, 2.0)
    assert one == (2 if recompute else 1)  # with its own tangent, and for the gradient
    assert needed(2.0, 2.0, 2.0) == 0
    assert needed(3.0, 2.0, 4.0) == 2 * one


@both_modes
def test_compiled_blocks_follow_their_attributes(
    recompute: bool, graphs: Callable[[], int], assert_same: Any
) -> None:
    nets = model, eager = SmallNet(2.0, 3.0, 2.0), SmallNet(2.0, 3.0, 2.0)
    compile_blocks(model)

    def change(function: Callable[[SmallNet], Any]) -> None:
        for net in nets:
            function(net)
        compare(model, eager, recompute, assert_same)

    change(lambda net: net)
    change(lambda net: setattr(net.blocks[0], "factor", 0.5))
    change(lambda net: setattr(net.blocks[1], "act", nn.Tanh()))
    change(lambda net: net.eval())
    change(lambda net: net.blocks[1].train())
    seen = graphs()
    change(lambda net: net.train())
    change(lambda net: net.eval())
    with torch.no_grad():  # a new variant of a block that was not the first of its build
        got, expected = (call(net.train()) for net in nets)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert graphs() > seen


@both_modes
def test_a_compiled_block_in_a_wrapper(recompute: bool, make_model: Any, assert_same: Any) -> None:
    """``torch.compile(block)`` gives another module; ``block.compile()`` does not."""
    model, eager = make_model(seed=3), make_model(seed=3)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    own = state(model)
    compare(model, eager, recompute, assert_same)
    assert state(model) == own
    compare(torch.compile(make_model(seed=3), backend="eager"), eager, recompute, assert_same)


def test_compiled_by_the_backend_that_the_block_names() -> None:
    graphs: list[torch.fx.GraphModule] = []
    model, expected = SmallNet(2.0, 2.0), call(SmallNet(2.0, 2.0))
    for block in model.blocks:
        block.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(call(model), expected, rtol=1e-12, atol=1e-12)
    assert graphs


def test_compiled_by_default(graphs: Callable[[], int], assert_same: Any) -> None:
    """With inductor."""
    model = SmallNet(2.0, 2.0)
    for block in model.blocks:
        block.compile()
    compare(model, SmallNet(2.0, 2.0), True, assert_same)
    assert graphs() == 2


@both_modes
def test_a_compiled_anchor(recompute: bool, make_model: Any) -> None:
    model = make_model(seed=3)
    expected = (model(X, 2 - T, Y), *call(model))
    compile_blocks(model)
    got = anchored_jvp(model, (X, 2 - T, Y), (X, T), (DX, DT), Y, recompute=recompute)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def saved_per_block(make_model: Any, forward: Callable[[LightningDiT], Any]) -> tuple[int, int]:
    """Tensors and values that one more block keeps for the backward pass."""

    def saved(depth: int) -> tuple[int, int]:
        model, kept = make_model(seed=3, depth=depth), []
        own = {p.data_ptr() for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in own:
                kept.append(x.numel())
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            forward(model)
        return len(kept), sum(kept)

    (few, small), (many, large) = saved(1), saved(3)
    return (many - few) // 2, (large - small) // 2


def test_recomputation_keeps_only_the_inputs_of_a_block(make_model: Any) -> None:
    def recomputed(model: LightningDiT) -> Any:
        return call(model, recompute=True)

    # Tokens (4, 4, 16) and conditioning (4, 16).
    assert saved_per_block(make_model, recomputed) == (2, 4 * 4 * 16 + 4 * 16)


def test_the_tangent_is_not_recorded(make_model: Any) -> None:
    """A block keeps what the ordinary forward pass keeps, and nothing for its tangent."""
    plain = saved_per_block(make_model, lambda model: model(X, T, Y))
    assert saved_per_block(make_model, call) == plain
    assert plain[0] > 15
    assert plain[1] > 10 * (4 * 4 * 16 + 4 * 16)


def memory(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that are allocated afterwards, with the result kept; and at most at one time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = function()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del kept
    levels = list(accumulate(change for _, change in changes))
    return levels[-1], max(levels)


def test_tangents_are_freed_on_the_way(make_model: Any) -> None:
    """What stays is the result; what passes does not grow with the depth."""
    t, kept, passing = T.detach().requires_grad_(), {}, {}
    for depth in (2, 6):
        model = make_model(seed=3, depth=depth)
        plain, _ = memory(lambda model=model: model(X, t, Y))
        kept[depth], peak = memory(lambda model=model: call(model))
        assert kept[depth] == plain + X.nbytes
        passing[depth] = peak - kept[depth]
    assert passing[2] == passing[6] < (kept[6] - kept[2]) / 4  # of one block


@both_modes
def test_memory_is_linear_in_tokens(
    recompute: bool, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", 1 << 10)

    def peak(size: int) -> int:
        model = make_model(seed=3, input_size=size)
        x, t, y = torch.ones(2, 3, size, size, dtype=torch.float64), T[:2], Y[:2]

        def step() -> None:
            value, tangent = chain_jvp(model, (x, t), (x, t), y, recompute=recompute)
            (value * tangent).sum().backward()
            model.zero_grad()

        return memory(step)[1]

    assert 3.6 < peak(32) / peak(16) < 4.1


LOW = torch.bfloat16
INPUTS = [z.float() for z in (X, T)], [z.float() for z in (DX, DT)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@both_modes
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_autocast(inside: bool, recompute: bool, make_model: Any, assert_same: Any) -> None:
    """Value and gradients are those of PyTorch; the tangent is as exact as the value."""
    (x, t), along = INPUTS
    model = make_model(seed=3).float()
    exact = chain_jvp(
        make_model(seed=3).double(), (x.double(), t.double()), [d.double() for d in along], Y
    )
    types: list[torch.dtype] = []
    model.t_embedder.register_forward_hook(lambda _, __, output: types.append(output.dtype))

    def step(forward: Callable[[], tuple[Tensor, Tensor | None]]) -> Any:
        with torch.autocast("cpu", LOW):
            with torch.no_grad():
                model(x, t, Y)  # leaves casts without a graph in autocast's cache
            value, tangent = forward()
            if inside:
                return value, tangent, gradients(model, value.float().square().sum())
        return value, tangent, gradients(model, value.float().square().sum())

    def plain() -> tuple[Tensor, None]:
        torch.clear_autocast_cache()
        return model(x, t, Y), None

    expected, _, expected_gradients = step(plain)
    value, tangent, got_gradients = step(
        lambda: chain_jvp(model, (x, t), along, Y, recompute=recompute)
    )
    assert value.dtype == tangent.dtype == LOW
    assert set(types) == {torch.float32}
    assert torch.equal(value, expected)
    assert_same(got_gradients, expected_gradients, 1e-5)
    errors = [relative_error(*pair) for pair in zip((value, tangent), exact, strict=True)]
    assert max(errors) < 0.01, errors


@both_modes
def test_an_anchor_under_autocast(recompute: bool, make_model: Any, assert_same: Any) -> None:
    (x, t), along = INPUTS
    model = make_model(seed=3).float()
    with torch.autocast("cpu", LOW):
        expected = model(x, 2 - t, Y), *chain_jvp(model, (x, t), along, Y)
        loss = expected[0].float().square().sum() + expected[1].float().sum()
        expected_gradients = gradients(model, loss)
        got = anchored_jvp(model, (x, 2 - t, Y), (x, t), along, Y, recompute=recompute)
        loss = got[0].float().square().sum() + got[1].float().sum()
        assert_same(gradients(model, loss), expected_gradients, 0.01)
    assert all(map(torch.equal, got, expected))


@both_modes
def test_a_network_in_bfloat16(recompute: bool, make_model: Any, assert_same: Any) -> None:
    inputs = [[z.bfloat16() for z in pair] for pair in INPUTS]
    model = make_model(seed=3).bfloat16()
    exact = chain_jvp(
        make_model(seed=3).bfloat16().double(), *([z.double() for z in p] for p in inputs), Y
    )
    value, tangent = chain_jvp(model, *inputs, Y, recompute=recompute)
    assert value.dtype == tangent.dtype == LOW
    errors = [relative_error(*pair) for pair in zip((value, tangent), exact, strict=True)]
    assert max(errors) < 0.01, errors
    got = gradients(model, value.sum())
    got = {name: gradient.float() for name, gradient in got.items()}
    expected = gradients(model, model(*inputs[0], Y).sum())
    assert_same(got, {name: gradient.float() for name, gradient in expected.items()}, 1e-5)


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        (None, "blocks = None"),
        ([], "blocks = "),
        ([nn.Linear(2, 2)], "blocks = "),
        (3, "blocks = 3"),
    ],
    ids=["none", "empty", "foreign", "number"],
)
def test_recomputation_needs_the_networks_own_blocks(blocks: Any, problem: str) -> None:
    model = SmallNet(2.0)
    del model.blocks
    if blocks is not None:
        model.blocks = blocks
    model.forward = lambda x, t, _: model.first(x)
    with pytest.raises(
        InvalidInputError, match=f"SmallNet.{problem}.*`blocks`, or .*recompute=False"
    ):
        call(model, recompute=True)
    call(model)
    with torch.no_grad():
        call(model, recompute=True)


@both_modes
def test_dropout_is_refused_where_it_is_active(recompute: bool) -> None:
    model = SmallNet(2.0, 2.0)
    model.blocks[1].act = nn.Sequential(nn.Tanh(), nn.Dropout(0.1))
    with pytest.raises(InvalidInputError, match=r"^blocks.1.act.1 = Dropout.* evaluation mode"):
        call(model, recompute)
    call(model.eval(), recompute)
    model.train().blocks[1].act[1].p = 0.0
    call(model, recompute)


def test_activation_checkpointing_is_refused() -> None:
    model = SmallNet(2.0, 2.0)
    model.blocks[1].gradient_checkpointing = True
    with pytest.raises(InvalidInputError, match=r"^blocks.1.gradient_checkpointing = .*recompute"):
        call(model)


class Calls(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@both_modes
@both_builds
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: torch.cdist(x, x),
            r"^blocks.1.act.0 \(Calls\): torch.functional.cdist has no forward-mode derivative"
            ". Write it .*, or register a `tangent_rule` for it.$",
        ),
        (
            lambda x: F.dropout(x, 0.1),
            r"^blocks.1.act.0 \(Calls\): torch.nn.functional.dropout drops .* probability to 0.$",
        ),
    ],
    ids=["operation", "dropout"],
)
def test_what_has_no_tangent_is_named(
    function: Callable[[Tensor], Any], message: str, compiled: bool, recompute: bool
) -> None:
    model = SmallNet(2.0, 2.0)
    model.blocks[1].act = nn.Sequential(Calls(function))
    if compiled:
        compile_blocks(model)
    own = state(model)
    with pytest.raises(TangentError, match=message):
        call(model, recompute)
    assert state(model) == own


def test_a_recomputed_block_hides_no_tensors() -> None:
    """In an object whose tensors are not found they would have no gradient."""
    model = SmallNet(2.0)

    class Output:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    model.blocks[0].forward = lambda x, t: Output(x * t)
    model.forward = lambda x, t, _: model.blocks[0](x, t.view(-1, 1, 1, 1)).x
    with pytest.raises(TangentError, match=r"blocks.0 .* is a Output: .* Return tensors"):
        call(model, recompute=True)
    _, tangent = call(model)
    torch.testing.assert_close(tangent, DX * T.view(-1, 1, 1, 1) + X * DT.view(-1, 1, 1, 1))
