"""Chain-JVP: value with graph, tangent without, one block at a time (FACM, arXiv 2507.03738).

``J_F v = J_{f_L}( … J_{f_1} v)``: the network runs once, on dual numbers (value, tangent). Each
block computes its tangent inside its own call, so under FSDP2 it is unsharded for its own step
only, and its hooks fire as for any forward pass; gradients of the value are reduced as usual.

Nothing of a block's tangent is recorded by autograd. The few operations outside the blocks
(embeddings, last layer) run as ordinary forward-mode AD, and their tangent graph is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

Forward = Callable[..., Tensor]


def chain_jvp(
    model: Any,
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor, Tensor],
    *extra: Any,
    recompute: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """F(x, t, …) and its directional derivative along (dx, dt).

    Args:
        model: Network with ``blocks``, called as ``model(x, t, *extra, **kwargs)``; a plain module
            or one under ``fully_shard``. Its code is not touched; a block returns one tensor.
        primals: (x, t), shapes (B, …) and (B,).
        tangents: (dx, dt), shaped like the primals; no gradient flows into them.
        extra: Further positional arguments, constant along the direction.
        recompute: A block keeps only its inputs for the backward pass, which computes its value
            again, instead of its activations.
        kwargs: Keyword arguments, constant along the direction.

    Returns:
        (value, tangent), both shaped like the model's output. The value carries the graph of an
        ordinary forward pass where gradients are enabled; the tangent carries none.

    Raises:
        ValueError: a tangent's shape differs from its primal's.
        NotImplementedError: an operation of the network has no forward-mode derivative.
    """
    for name, primal, tangent in zip(("x", "t"), primals, tangents, strict=True):
        if primal.shape != tangent.shape:
            raise ValueError(
                f"tangent d{name} has shape {tuple(tangent.shape)}, "
                f"but {name} has {tuple(primal.shape)}: give one tangent per value"
            )
    dual_forward = _recomputed if recompute else _recorded
    with forward_ad.dual_level(), _replaced_forward(model.blocks, dual_forward):
        duals = map(_make_dual, primals, tangents)
        output = model(*duals, *extra, **kwargs)
        return _primal(output), _tangent_or_zero(output)


@contextmanager
def _replaced_forward(
    blocks: Iterable[nn.Module], dual_forward: Callable[..., Tensor]
) -> Iterator[None]:
    """Let ``block(...)`` run `dual_forward` in place of its own forward, inside its hooks."""
    blocks = list(blocks)
    for block in blocks:
        block.forward = partial(dual_forward, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance attribute: the class's own method shows again


def _recorded(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Value with its graph from the block's own forward; tangent from a second pass without."""
    primal_args, primal_kwargs = tree_map_only(Tensor, _primal, (args, kwargs))
    value = forward(*primal_args, **primal_kwargs)
    _, tangent = _dual_pass(forward, args, kwargs)
    return _make_dual(value, tangent)


def _recomputed(forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """Value and tangent from one pass without graph; the backward pass runs the block again."""
    value, tangent = _dual_pass(forward, args, kwargs)
    if torch.is_grad_enabled():
        leaves, structure = tree_flatten(tree_map_only(Tensor, _primal, (args, kwargs)))
        # Autograd asks for the backward pass of a function only if some input wants a gradient,
        # and a block's parameters are no inputs.
        asks_for_gradient = torch.empty(0, requires_grad=True)
        value = _Recompute.apply(value, forward, structure, asks_for_gradient, *leaves)
    return _make_dual(value, tangent)


class _Recompute(torch.autograd.Function):
    """Hands out a value computed earlier; differentiates it by running the block once more."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, block: Forward, structure: Any, _: Tensor, *leaves: Any
    ) -> Tensor:
        ctx.block, ctx.structure = block, structure
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        needed = ctx.needs_input_grad[4:]
        leaves = [
            next(tensors).detach().requires_grad_(wanted) if is_tensor else next(constants)
            for is_tensor, wanted in zip(ctx.is_tensor, needed, strict=True)
        ]
        args, kwargs = tree_unflatten(leaves, ctx.structure)
        with torch.enable_grad():
            value = ctx.block(*args, **kwargs)
        # Not autograd.grad: parameters' gradients accumulate where FSDP's hooks look for them.
        torch.autograd.backward(value, gradients)
        return (
            None,
            None,
            None,
            None,
            *(leaf.grad if wanted else None for leaf, wanted in zip(leaves, needed, strict=True)),
        )


def _dual_pass(forward: Forward, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Value and tangent of a block on dual inputs, without graph."""
    # PyTorch's fused attention kernels have no forward-mode derivative.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        args, kwargs = tree_map_only(Tensor, _without_graph, (args, kwargs))
        output = forward(*args, **kwargs)
    return _primal(output), _tangent_or_zero(output)


def _make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    # A fresh view: a tensor that is dual already cannot be given another tangent.
    return forward_ad.make_dual(primal.view_as(primal), tangent.to(primal.dtype))


def _primal(x: Tensor) -> Tensor:
    return forward_ad.unpack_dual(x).primal


def _tangent_or_zero(x: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(x)
    return torch.zeros_like(primal) if tangent is None else tangent.detach()


def _without_graph(x: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is None:
        return primal.detach()
    return forward_ad.make_dual(primal.detach(), tangent.detach())
