"""Chain-JVP: value with graph and tangent without, block by block (FACM, arXiv 2507.03738).

``J_F v = J_{f_L}( … J_{f_1} v)``: one ordinary call of the network carries (value, tangent) through
its own code as `DualTensor`s. Where modules meet hooks (the blocks, and every module that FSDP
shards) the pairs are passed as plain tensors, so that FSDP2's hooks see what they always see: each
block is unsharded for its own step only, and its gradients are reduced as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_map_only, tree_unflatten

from facm_core.errors import require
from facm_core.jvp.compiled import compilers, execute_compiled
from facm_core.jvp.dual import DualTensor, as_lane
from facm_core.jvp.rules import TangentError

Forward = Callable[..., Any]


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
        recompute: A block keeps only its inputs for the backward pass, which computes its
            activations again. Needs ``model.blocks``.
        kwargs: Keyword arguments, constant along the direction.

    Returns:
        (value, tangent), both shaped like the model's output. The value carries the graph of an
        ordinary forward pass where gradients are enabled; the tangent carries none.

    Raises:
        InvalidInputError: a tangent's shape is not its primal's; no usable ``model.blocks``.
        TangentError: an operation of the network has no derivative here.
    """
    x, t = (Packed([primal], [tangent]) for primal, tangent in _checked(model, primals, tangents))
    ((value, tangent),) = _call(model, (x, t, *extra), kwargs, recompute)
    return value, tangent


def anchored_jvp(
    model: Any,
    anchor: tuple[Any, ...],
    primals: tuple[Tensor, Tensor],
    tangents: tuple[Tensor, Tensor],
    *extra: Any,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`chain_jvp`, and in the same call of the network its value at another point.

    Args:
        model: As for `chain_jvp`.
        anchor: (x, t, *extra) of the other point, each shaped like its counterpart. What is the
            same object in both is processed once.
        primals: As for `chain_jvp`.
        tangents: As for `chain_jvp`.
        extra: As for `chain_jvp`.
        recompute: As for `chain_jvp`.

    Returns:
        (value at the anchor, value, tangent).
    """
    pairs = _checked(model, primals, tangents)
    x, t = (
        Packed([at_anchor, primal], [None, tangent])
        for at_anchor, (primal, tangent) in zip(anchor[:2], pairs, strict=True)
    )
    rest = (
        mine if mine is its else Packed([its, mine], [None, None])
        for its, mine in zip(anchor[2:], extra, strict=True)
    )
    (at_anchor, _), (value, tangent) = _call(model, (x, t, *rest), {}, recompute)
    return at_anchor, value, tangent


class Packed(NamedTuple):
    """The lanes of a dual tensor as plain tensors, in a shape that hooks can walk through."""

    values: list[Tensor]
    tangents: list[Tensor | None]


def _pack(tree: Any) -> Any:
    def pack(dual: DualTensor) -> Packed:
        lanes = [dual.lane(i) for i in range(len(dual.lanes))]
        return Packed([lane.value for lane in lanes], [lane.tangent for lane in lanes])

    return tree_map_only(DualTensor, pack, tree)


def _unpack(tree: Any) -> Any:
    return _map_packed(
        lambda packed: DualTensor([as_lane(*lane) for lane in zip(*packed, strict=True)]), tree
    )


def _checked(
    model: nn.Module, primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of primal and tangent."""
    for name, primal, tangent in zip(("x", "t"), primals, tangents, strict=True):
        require(
            tangent.shape == primal.shape,
            f"d{name}",
            tuple(tangent.shape),
            f"{name} of {type(model).__name__} has shape {tuple(primal.shape)}",
            "Give one tangent per value",
        )
    return [(primal, d.detach()) for primal, d in zip(primals, tangents, strict=True)]


def _call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], recompute: bool
) -> list[tuple[Tensor, Tensor]]:
    """Call the network on packed tensors; value and tangent of each lane."""
    x, t, *extra = args
    if torch.is_grad_enabled():
        t = _wanting_gradients(t)
    _check_determinism(model)
    torch.clear_autocast_cache()  # casts made without gradients would cut ours off
    recomputed = _blocks(model) if recompute and torch.is_grad_enabled() else []
    backends = compilers(model)
    # They meet plain tensors at their borders.
    units = [x for x in model.modules() if isinstance(x, FSDPModule) or x in backends]
    with ExitStack() as stack:
        # A compiled function inside the network would compile us as well.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_called_uncompiled(model))
        stack.enter_context(_forward(model, partial(_carry, model.forward)))
        for unit in {*recomputed, *units} - {model}:
            execute = partial(_carry, unit.forward)
            if unit in backends:
                execute = partial(execute_compiled, unit, backends[unit], execute)
                stack.enter_context(_called_uncompiled(unit))
            forward = execute
            if unit in recomputed:
                inner = (part for part in unit.modules() if part is not unit)
                sharded = [part for part in inner if isinstance(part, FSDPModule)]
                forward = partial(_recompute, execute, sharded)
            stack.enter_context(_forward(unit, forward))
            stack.enter_context(_packed_at_hooks(unit))
        try:
            output = model(x, t, *extra, **kwargs)
        except TangentError as error:
            error.module = _raising_module(model, error)
            raise
    if not isinstance(output, Packed):  # depends on neither x nor t
        output = Packed([output] * len(t.values), [None] * len(t.values))
    return [
        (value, torch.zeros_like(value) if tangent is None else tangent)
        for value, tangent in zip(*output, strict=True)
    ]


def _wanting_gradients(t: Packed) -> Packed:
    """FSDP gives a unit back when its inputs have their gradient: one that embeds t, too."""
    values = [x if x.requires_grad else x.detach().requires_grad_() for x in t.values]
    return Packed(values, t.tangents)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The model's block list.

    Raises:
        InvalidInputError: it has none.
    """
    blocks = getattr(model, "blocks", None)
    modules = list(blocks) if isinstance(blocks, Iterable) else []
    require(
        bool(modules) and set(modules) <= set(model.modules()),
        f"{type(model).__name__}.blocks",
        blocks,
        "not a list of this network's own modules",
        "Give the network a property `blocks`, or use recompute=False",
    )
    return modules


def _check_determinism(model: nn.Module) -> None:
    """A network must compute the same each time it is asked."""
    for path, module in model.named_modules():
        drops = isinstance(module, _DropoutNd) and module.training and module.p > 0
        require(
            not drops,
            path,
            module,
            "dropout is active inside the JVP: value, tangent and gradient need one mask",
            "Set its p to 0 or put it in evaluation mode",
        )
        require(
            not getattr(module, "gradient_checkpointing", False),
            f"{path}.gradient_checkpointing".lstrip("."),
            True,
            "activation checkpointing does not know tangents",
            "Switch it off and use recompute=True",
        )


def _raising_module(model: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose code was running."""
    paths = {module: path or type(model).__name__ for path, module in model.named_modules()}
    running = (frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__))
    found = [x for x in running if isinstance(x, nn.Module) and x in paths]
    return f"{paths[found[-1]]} ({type(found[-1]).__name__})"


@contextmanager
def _packed_at_hooks(unit: nn.Module) -> Iterator[None]:
    """Between a module's first and last hook, dual tensors are plain ones."""
    before = unit.register_forward_pre_hook(
        lambda _, args, kwargs: _pack((args, kwargs)), prepend=True, with_kwargs=True
    )
    after = unit.register_forward_hook(lambda _, __, output: _unpack(output))
    try:
        yield
    finally:
        before.remove()
        after.remove()


@contextmanager
def _forward(unit: nn.Module, forward: Forward) -> Iterator[None]:
    """Let ``unit(…)`` call `forward` inside the unit's hooks."""
    own = vars(unit).get("forward")
    unit.forward = forward
    try:
        yield
    finally:
        if own is None:
            del unit.forward  # the instance attribute: the class's own method shows again
        else:
            unit.forward = own  # some libraries wrap a single instance


@contextmanager
def _called_uncompiled(unit: nn.Module) -> Iterator[None]:
    compiled, unit._compiled_call_impl = unit._compiled_call_impl, None
    try:
        yield
    finally:
        unit._compiled_call_impl = compiled


def _carry(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Value recorded, tangent beside it; packed in, packed out."""
    args, kwargs = _unpack((args, kwargs))
    return _pack(forward(*args, **kwargs))


def _recompute(execute: Forward, sharded: Sequence[FSDPModule], *args: Any, **kwargs: Any) -> Any:
    """Inputs kept only; packed in, packed out."""
    with torch.no_grad():
        outputs = execute(*args, **kwargs)
    torch.clear_autocast_cache()
    results, out_structure = tree_flatten(outputs)
    for leaf in results:
        if not (leaf is None or isinstance(leaf, Tensor | int | float | str)):
            raise TangentError(
                f"is a {type(leaf).__name__}: tensors inside of it would lose their gradient",
                "Return tensors, or register the class with `torch.utils._pytree`",
            )
    leaves, structure = tree_flatten(_without_tangents((args, kwargs)))
    call = _BlockCall(execute, sharded, structure, out_structure, _autocast(leaves))
    # Autograd runs the backward pass of a function only if one of its inputs wants a gradient,
    # and a block's parameters are no inputs.
    wants_gradient = torch.empty(0, requires_grad=True)
    return tree_unflatten(_Recompute.apply(call, results, wants_gradient, *leaves), out_structure)


@dataclass(frozen=True)
class _BlockCall:
    """One call of a block, as far as it is no tensor."""

    execute: Forward
    sharded: Sequence[FSDPModule]
    structure: TreeSpec
    out_structure: TreeSpec
    autocast: Callable[[], torch.autocast]


class _Recompute(torch.autograd.Function):
    """Gives the results of a block; differentiates it by running it once more, lane by lane."""

    @staticmethod
    def forward(
        ctx: Any, call: _BlockCall, results: list[Any], _: Tensor, *leaves: Any
    ) -> tuple[Any, ...]:
        ctx.call = call
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.constants = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        outputs = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in results]
        values = tree_flatten(_without_tangents(tree_unflatten(outputs, call.out_structure)))[0]
        differentiable = {id(value) for value in values}
        ctx.mark_non_differentiable(
            *(x for x in outputs if isinstance(x, Tensor) and id(x) not in differentiable)
        )
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        tensors, constants = iter(ctx.saved_tensors), iter(ctx.constants)
        wanted = ctx.needs_input_grad[3:]
        leaves = [
            next(tensors).detach().requires_grad_(wants) if is_tensor else next(constants)
            for is_tensor, wants in zip(ctx.is_tensor, wanted, strict=True)
        ]
        inputs = tree_unflatten(leaves, ctx.call.structure)
        by_output = tree_unflatten(list(gradients), ctx.call.out_structure)
        for lane in range(_lane_count(by_output)):
            args, kwargs = _pick(inputs, lane)
            for part in ctx.call.sharded:
                # After its first backward pass FSDP would take the next for the same one, and
                # reduce nothing.
                part._get_fsdp_state()._training_state = TrainingState.IDLE
            with torch.enable_grad(), ctx.call.autocast():
                outputs = ctx.call.execute(*args, **kwargs)
            results = tree_flatten(outputs)[0]
            given = tree_flatten(_pick(by_output, lane))[0]
            pairs = [
                (y, dy)
                for y, dy in zip(results, given, strict=True)
                if dy is not None and y.requires_grad  # else the block and all before are frozen
            ]
            if pairs:
                # Not autograd.grad: parameters' gradients accumulate where FSDP's hooks look.
                torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
            # What is no lane's own has been differentiated now.
            by_output = tree_map(_packed_only, by_output, is_leaf=_is_packed)
        return (
            None,
            None,
            None,
            *(x.grad if w else None for x, w in zip(leaves, wanted, strict=True)),
        )


def _autocast(leaves: Iterable[Any]) -> Callable[[], torch.autocast]:
    """Autocast as it is now."""
    device = next(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))
    return partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )


def _without_tangents(tree: Any) -> Any:
    return _map_packed(lambda packed: Packed(packed.values, [None] * len(packed.values)), tree)


def _pick(tree: Any, lane: int) -> Any:
    """The values of one lane, and what is no lane's own."""
    return _map_packed(lambda packed: packed.values[lane], tree)


def _packed_only(leaf: Any) -> Packed | None:
    return leaf if isinstance(leaf, Packed) else None


def _lane_count(tree: Any) -> int:
    counts: list[int] = []
    _map_packed(lambda packed: counts.append(len(packed.values)), tree)
    return max(counts, default=1)


def _map_packed(function: Callable[[Packed], Any], tree: Any) -> Any:
    return tree_map_only(Packed, function, tree, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)
