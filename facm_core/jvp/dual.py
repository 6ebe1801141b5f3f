"""Dual tensors: values with tangents, carried through a network's own code.

A `DualTensor` goes wherever a tensor goes. Each operation on it runs on its values as it always
would, recorded by autograd where gradients are enabled, and beside that on its tangents, which are
never recorded (`facm_core.jvp.rules`). Tangents belong to the wrapper, not to the values that
autograd saves, so each is freed as soon as the network's code drops it.

A dual tensor has one or more *lanes*: evaluations of the network that run side by side, operation
by operation. What is the same for all of them (parameters, conditions) stays an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from facm_core.jvp.rules import (
    Lane,
    TangentError,
    is_differentiable,
    leaves,
    map_leaves,
    rebuilt,
    tangent_of,
    writes_in_place,
)

Function = Callable[..., Any]


class DualTensor(Tensor):
    """A tensor to the network's code; `lanes` holds what is computed."""

    lanes: tuple[Lane, ...]

    @staticmethod
    def __new__(cls, lanes: Sequence[Lane]) -> DualTensor:
        value = lanes[0].value
        self: DualTensor = Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=value.device
        )
        self.hold(lanes)
        return self

    def hold(self, lanes: Sequence[Lane]) -> None:
        """Have these lanes from now on."""
        if len({(lane.value.shape, lane.value.dtype) for lane in lanes}) > 1:
            raise TangentError("has shapes or types that differ between tasks", _REMEDY)
        self.lanes = tuple(lanes)
        # Only a custom autograd Function looks at it; what that gives has a `grad_fn` then.
        with torch._C.DisableTorchFunctionSubclass():
            self.requires_grad = any(lane.value.requires_grad for lane in lanes)

    def lane(self, index: int) -> Lane:
        """One of the lanes, for use.

        Raises:
            TangentError: something changed the value without its tangent or without its graph.
        """
        with torch._C.DisableTorchFunctionSubclass():
            function = self.grad_fn
        if function is not None:
            raise TangentError(
                f"uses what {function.name()} computed, a custom autograd Function whose gradient "
                "would be lost",
                "Write it with PyTorch's functions, or call it inside a block and recompute",
            )
        lane = self.lanes[index]
        if lane.value._version != lane.version:
            raise TangentError(
                "uses a tensor that was written to through another view of it", "Write out of place"
            )
        return lane

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return _on_lanes(func, args, kwargs or {})
        except TangentError as error:
            error.operation = error.operation or torch.overrides.resolve_name(func) or str(func)
            raise

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        error = TangentError("is called past PyTorch's Python functions", _REMEDY)
        error.operation = str(func)
        raise error


_REMEDY = "Write it with PyTorch's functions, or register a `tangent_rule` for it"


def _on_lanes(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _METADATA:  # the same in every lane
        return func(args[0].lanes[0].value, *args[1:], **kwargs)
    if func in _OPENED:
        return _OPENED[func](*args, **kwargs)
    if func in _OUTSIDE:
        raise TangentError("leads past what carries tangents", _REMEDY)
    if kwargs.get("out") is not None:
        raise TangentError("writes into its argument `out`", "Use what it returns")
    in_place = writes_in_place(func, kwargs)
    if in_place and not isinstance(args[0], DualTensor):
        raise TangentError(
            "writes what depends on x or t into a tensor made without them",
            "Make that tensor with empty_like or new_zeros",
        )
    duals = (leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, DualTensor))
    lanes = range(len(next(duals).lanes))
    results = [_evaluate(func, _lane(args, i), _lane(kwargs, i), in_place) for i in lanes]
    if not in_place:
        return _merge(results)
    args[0].hold(results)
    return args[0]


def as_lane(value: Tensor, tangent: Tensor | None) -> Lane:
    """The pair, with the tangent in the value's dtype."""
    return Lane(value, None if tangent is None else tangent.to(value.dtype), value._version)


def _evaluate(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Any:
    """One lane: the operation's tensors as `Lane`s."""
    lanes = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Lane)]
    carries = any(lane.tangent is not None for lane in lanes)
    values, keywords = map_leaves(_value, args), map_leaves(_value, kwargs)
    if in_place:
        tangent = tangent_of(func, args, kwargs, None) if carries else None
        func(*values, **keywords)
        return as_lane(values[0], tangent)
    result = func(*values, **keywords)
    if any(lane.value._version != lane.version for lane in lanes):
        raise TangentError("changes its argument", "Write out of place")
    carries = carries and any(map(is_differentiable, leaves(result)))
    return _pair(result, tangent_of(func, args, kwargs, result) if carries else None)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Lane) else leaf


def _pair(values: Any, tangents: Any) -> Any:
    if isinstance(values, Tensor):
        return as_lane(values, tangents if is_differentiable(values) else None)
    if isinstance(values, tuple | list):
        tangents = [None] * len(values) if tangents is None else tangents
        return rebuilt(values, [_pair(*pair) for pair in zip(values, tangents, strict=True)])
    return values


def _merge(results: list[Any]) -> Any:
    """The lanes' results as one."""
    first = results[0]
    if isinstance(first, Lane):
        return DualTensor(results)
    if isinstance(first, tuple | list):
        return rebuilt(first, [_merge(list(items)) for items in zip(*results, strict=True)])
    if any(result != first for result in results[1:]):
        raise TangentError("steers Python by values that differ between tasks", _REMEDY)
    return first


def _lane(tree: Any, index: int) -> Any:
    return map_leaves(lambda leaf: leaf.lane(index) if isinstance(leaf, DualTensor) else leaf, tree)


def _opened(function: Function) -> Function:
    """The code of a Python function that hands itself over whole where it meets a dual tensor."""
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(function.__code__, names)


_OPENED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
_METADATA = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta")
    ),
    *(
        getattr(Tensor, name)
        for name in ("size", "dim", "numel", "stride", "is_floating_point", "is_contiguous")
    ),
    Tensor.__len__,
    torch.is_floating_point,
}
_OUTSIDE = {
    *(
        getattr(Tensor, name)
        for name in ("data_ptr", "numpy", "__array__", "__dlpack__", "storage", "untyped_storage")
    ),
    *(getattr(Tensor, name) for name in ("set_", "__reduce_ex__", "register_hook")),
    Tensor.data.__set__,  # type: ignore[attr-defined]
}
