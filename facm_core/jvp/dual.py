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
from typing import Any

import torch
from torch import Tensor

from facm_core.jvp.rules import (
    Lane,
    TangentError,
    leaves,
    map_leaves,
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
        self.lanes = tuple(lanes)
        return self

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
    if func in _OUTSIDE:
        raise TangentError("takes values out of PyTorch", _REMEDY)
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
    args[0].lanes = tuple(results)
    return args[0]


def as_lane(value: Tensor, tangent: Tensor | None) -> Lane:
    """The pair, with the tangent in the value's dtype."""
    return Lane(value, None if tangent is None else tangent.to(value.dtype), value._version)


def _evaluate(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], in_place: bool) -> Any:
    """One lane: the operation's tensors as `Lane`s."""
    carries = any(isinstance(x, Lane) and x.tangent is not None for x in leaves((args, kwargs)))
    values, keywords = map_leaves(_value, args), map_leaves(_value, kwargs)
    if in_place:
        tangent = tangent_of(func, args, kwargs, None) if carries else None
        func(*values, **keywords)
        return as_lane(values[0], tangent)
    result = func(*values, **keywords)
    return _pair(result, tangent_of(func, args, kwargs, result) if carries else None)


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Lane) else leaf


def _pair(values: Any, tangents: Any) -> Any:
    if isinstance(values, Tensor):
        differentiable = values.is_floating_point() or values.is_complex()
        return as_lane(values, tangents if differentiable else None)
    if isinstance(values, tuple | list):
        tangents = [None] * len(values) if tangents is None else tangents
        items = [_pair(*pair) for pair in zip(values, tangents, strict=True)]
        return tuple(items) if isinstance(values, tuple) else items
    return values


def _merge(results: list[Any]) -> Any:
    """The lanes' results as one."""
    first = results[0]
    if isinstance(first, Lane):
        return DualTensor(results)
    if isinstance(first, tuple | list):
        return type(first)(_merge(list(items)) for items in zip(*results, strict=True))
    if any(result != first for result in results[1:]):
        raise TangentError("steers Python by values that differ between tasks", _REMEDY)
    return first


def _lane(tree: Any, index: int) -> Any:
    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, DualTensor):
            return leaf
        lane = leaf.lanes[index]
        if lane.value._version != lane.version:
            raise TangentError(
                "reads a tensor that was written to through another view of it",
                "Write out of place",
            )
        return lane

    return map_leaves(pick, tree)


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
    getattr(Tensor, name)
    for name in ("data_ptr", "numpy", "__array__", "untyped_storage", "__dlpack__", "register_hook")
}
