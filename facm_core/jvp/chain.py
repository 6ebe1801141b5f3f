"""Chain-JVP: the tangent without graph, the value with one (FACM, arXiv 2507.03738).

``J_F v = J_{f_L}( … J_{f_1} v)``: a first pass carries (value, tangent) through the network module
by module, as dual numbers and without recording anything; a second pass is the ordinary forward
pass that the loss differentiates. Both are plain calls of the network, so under FSDP2 each block
is unsharded for its own step only and its hooks fire as always: gradients are reduced as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

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
        model: Network called as ``model(x, t, *extra, **kwargs)``, plain or under ``fully_shard``.
            Its code is not touched.
        primals: (x, t), shapes (B, …) and (B,).
        tangents: (dx, dt), shaped like the primals; no gradient flows into them.
        extra: Further positional arguments, constant along the direction.
        recompute: A block keeps only its inputs and its output for the backward pass, which runs
            it again, instead of its activations. Needs ``model.blocks``, each giving one tensor.
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
    blocks = list(dict.fromkeys(model.blocks)) if recompute else []  # a shared block once
    outputs: list[Tensor] = []
    with _replaced_forward(blocks, partial(_remember, outputs)):
        value, tangent = _dual_pass(model, primals, tangents, extra, kwargs)
    if torch.is_grad_enabled():
        with _replaced_forward(blocks, partial(_recall, iter(outputs))):
            value = model(*primals, *extra, **kwargs)
    return value, tangent


def _dual_pass(
    model: Any,
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor, Tensor],
    extra: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Value and tangent, both without graph."""
    # PyTorch's fused attention kernels have no forward-mode derivative.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = [
            forward_ad.make_dual(primal.detach(), tangent.detach().to(primal.dtype))
            for primal, tangent in zip(primals, tangents, strict=True)
        ]
        value, tangent = forward_ad.unpack_dual(model(*duals, *extra, **kwargs))
        # None: the output does not depend on the primals, as with a last layer of zeros.
        return value, torch.zeros_like(value) if tangent is None else tangent


@contextmanager
def _replaced_forward(
    blocks: list[nn.Module], replacement: Callable[..., Tensor]
) -> Iterator[None]:
    """Let ``block(…)`` call ``replacement(block.forward, …)`` inside the block's hooks."""
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(replacement, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward  # the instance attribute: the class's own method shows again
            else:
                block.forward = forward  # some libraries wrap a single instance


def _remember(outputs: list[Tensor], forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """A block of the first pass: keeps its value for the second."""
    output = forward(*args, **kwargs)
    outputs.append(forward_ad.unpack_dual(output).primal)
    return output


def _recall(outputs: Iterator[Tensor], forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
    """A block of the second pass: has its value already, and runs when its gradient is wanted."""
    leaves, structure = tree_flatten((args, kwargs))
    # Autograd runs the backward pass of a function only if one of its inputs wants a gradient,
    # and a block's parameters are no inputs.
    wants_gradient = torch.empty(0, requires_grad=True)
    output: Tensor = _Recompute.apply(next(outputs), forward, structure, wants_gradient, *leaves)
    return output


class _Recompute(torch.autograd.Function):
    """Gives a value computed earlier; differentiates it by running the block once more."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, block: Forward, structure: Any, _: Tensor, *leaves: Any
    ) -> Tensor:
        ctx.block, ctx.structure = block, structure
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        return value.detach()

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
        if value.requires_grad:  # unless the block and all before it are frozen
            # Not autograd.grad: parameters' gradients accumulate where FSDP's hooks look for them.
            torch.autograd.backward(value, gradients)
        input_gradients = (
            leaf.grad if wanted else None for leaf, wanted in zip(leaves, needed, strict=True)
        )
        return None, None, None, None, *input_gradients
