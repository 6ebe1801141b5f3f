"""Chain-JVP against the whole network at once: `torch.func.jvp`, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from facm_core.jvp import chain_jvp
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


def forwards(model: LightningDiT) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(b).items() if k == "forward"} for b in model.blocks]


@both_modes
def test_the_network_is_left_as_it_was(make_model: Any, recompute: bool) -> None:
    model = make_model(seed=3)
    before, code = model(X, T, Y), forwards(model)
    call(model, recompute)
    assert forwards(model) == code == [{}, {}]
    assert torch.equal(model(X, T, Y), before)


@both_modes
def test_the_network_is_left_as_it_was_after_an_error(make_model: Any, recompute: bool) -> None:
    model = make_model(seed=3)
    expected = call(model, recompute)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        call(model, recompute)
    handle.remove()
    assert forwards(model) == [{}, {}]
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
    expected = gradients(model, model(X, T, Y).square().sum())
    assert_same(gradients(model, call(model, recompute)[0].square().sum()), expected, 1e-10)
    assert forwards(model) == [{}] * 3


@pytest.mark.parametrize(("dx", "dt", "name"), [(DX[:3], DT, "dx"), (DX, DT[:, None], "dt")])
def test_a_tangent_of_another_shape_is_refused(
    dx: Tensor, dt: Tensor, name: str, make_model: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name} = .* one tangent per value"):
        chain_jvp(make_model(), (X, T), (dx, dt), Y)


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
