"""How tangents go through one operation: dy = (∂y/∂x)·dx, never recorded by autograd.

Matrix products, attention and the operations that are linear as they stand have rules of their
own; every other one is left to PyTorch's forward-mode derivative of that single operation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from facm_core.jvp.attention import attention_tangent

Operation = Callable[..., Any]
Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


class Lane(NamedTuple):
    """A value and its tangent, of one shape and dtype.

    Attributes:
        value: As the network computes it.
        tangent: None for zero.
        version: Of the value when the tangent was computed; tells writes through another view.
    """

    value: Tensor
    tangent: Tensor | None = None
    version: int = 0


class TangentError(NotImplementedError):
    """An operation through which no tangent can be carried.

    Args:
        problem: What is in the way, without a final stop.
        remedy: What to do instead, without a final stop.

    Attributes:
        operation: Its name.
        module: Path and class of the module that called it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy
        self.operation, self.module = "", ""

    def __str__(self) -> str:
        return f"{self.module}: {self.operation or 'the output'} {self.problem}. {self.remedy}."


Rule = Callable[[Operation, Arguments, Keywords, Any], Any]
"""``rule(operation, arguments, keywords, result)``: the tangent of `result`. Arguments that carry a
tangent are `Lane`s; what is no `Lane` is constant. Called without gradients."""

RULES: dict[Operation, Rule] = {}


def tangent_rule(*operations: Operation) -> Callable[[Rule], Rule]:
    """Decorator: register the rule of `operations`.

    They are functions, methods of tensors, or made by ``torch.library.custom_op``.
    """

    def register(rule: Rule) -> Rule:
        RULES.update({getattr(op, "_opoverload", op): rule for op in operations})
        return rule

    return register


def tangent_of(operation: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """Tangent of `result` = operation(*args, **kwargs), of the same structure.

    Raises:
        TangentError: the operation has no forward-mode derivative.
    """
    with torch.no_grad():
        return RULES.get(operation, single_operation)(operation, args, kwargs, result)


def single_operation(operation: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """PyTorch's own forward-mode derivative, in float32 or better; `result` is computed anew.

    Works on copies where the operation writes in place.
    """
    in_place = writes_in_place(operation, kwargs)

    def dual(leaf: Any) -> Any:
        if not isinstance(leaf, Lane):
            return wide(leaf)
        value = wide(leaf.value.detach())
        if in_place:
            value = value.clone()
        return value if leaf.tangent is None else forward_ad.make_dual(value, wide(leaf.tangent))

    def tangent(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        primal, tangent = forward_ad.unpack_dual(leaf)
        if tangent is None and is_differentiable(primal) and _is_custom(operation):
            raise NotImplementedError  # PyTorch takes it for a constant
        return torch.zeros_like(primal) if tangent is None else tangent

    with forward_ad.dual_level():
        args, kwargs = map_leaves(dual, args), map_leaves(dual, kwargs)
        try:
            output = operation(*args, **kwargs)
            return map_leaves(tangent, args[0] if in_place else output)
        except NotImplementedError as error:
            raise TangentError(
                "has no forward-mode derivative",
                "Write it with operations that have one, or register a `tangent_rule` for it",
            ) from error


def wide(leaf: Any) -> Any:
    """A tensor of less than float32 as float32, anything else as it is."""
    narrow = isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16)
    return leaf.float() if narrow else leaf


def is_differentiable(leaf: Any) -> bool:
    """Whether it is a tensor that can have a tangent."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _is_custom(operation: Operation) -> bool:
    """Whether it comes from ``torch.ops``, but not from PyTorch."""
    module = getattr(operation, "__module__", None) or ""
    return module.startswith(("torch._ops.", "torch.ops.")) and module != "torch._ops.aten"


def writes_in_place(operation: Operation, kwargs: Keywords) -> bool:
    """Whether the operation changes its first argument."""
    name = getattr(operation, "__name__", "")
    return bool(kwargs.get("inplace")) or _IN_PLACE.fullmatch(name) is not None


_IN_PLACE = re.compile(
    r"\w*[^_]_|__(setitem|i(add|sub|mul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))__"
)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of everything inside nested tuples, lists, dicts and slices."""
    if isinstance(tree, Lane):
        return function(tree)
    if isinstance(tree, torch.Size):
        return tree
    if isinstance(tree, tuple | list):
        return rebuilt(tree, [map_leaves(function, item) for item in tree])
    if isinstance(tree, dict):
        return {name: map_leaves(function, item) for name, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(map_leaves(function, x) for x in (tree.start, tree.stop, tree.step)))
    return function(tree)


def rebuilt(tree: Any, items: list[Any]) -> Any:
    """The tuple or list with other items."""
    # torch.return_types and named tuples take their items in different ways.
    return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)


def leaves(tree: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists, dicts and slices."""
    if isinstance(tree, tuple | list) and not isinstance(tree, Lane):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def _named(names: str) -> Iterator[Operation]:
    """The operations of these names in torch, torch.nn.functional and as methods."""
    for name in names.split():
        for home in (torch, F, Tensor):
            if callable(operation := getattr(home, name, None)):  # torch.half is a dtype
                yield operation


def _primal(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Lane) else leaf


def _operands(args: Arguments, kwargs: Keywords) -> list[Any]:
    """One operand or two, given by position or by name."""
    return [*args, *(kwargs[name] for name in ("input", "other", "mat2") if name in kwargs)]


def _by_name(names: tuple[str, ...], args: Arguments, kwargs: Keywords) -> Keywords:
    """The arguments of these names, given by position as far as there are any, or by keyword."""
    return {name: args[i] for i, name in enumerate(names[: len(args)])} | kwargs


def _tangent(leaf: Any) -> Tensor | None:
    return leaf.tangent if isinstance(leaf, Lane) else None


@tangent_rule(
    *_named(
        "view view_as reshape reshape_as flatten unflatten transpose t permute movedim moveaxis "
        "swapaxes swapdims squeeze unsqueeze expand expand_as broadcast_to repeat tile "
        "repeat_interleave contiguous clone chunk split tensor_split unbind select narrow gather "
        "index_select __getitem__ take_along_dim cat concat concatenate stack hstack vstack roll "
        "flip neg negative __neg__ sum mean cumsum diagonal tril triu pixel_shuffle "
        "pixel_unshuffle to type_as float double half bfloat16 real imag view_as_real "
        "view_as_complex"
    ),
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
    Tensor.real.__get__,  # type: ignore[attr-defined]
    Tensor.imag.__get__,  # type: ignore[attr-defined]
)
def linear_as_it_stands(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """The same operation on the tangents, with zeros for constants."""

    def tangent_or_zero(leaf: Any) -> Any:
        value, tangent = _primal(leaf), _tangent(leaf)
        if tangent is None and is_differentiable(value):
            return torch.zeros_like(value)
        return value if tangent is None else tangent

    return op(*map_leaves(tangent_or_zero, args), **map_leaves(tangent_or_zero, kwargs))


@tangent_rule(*_named("add __add__ __radd__ sub subtract __sub__"), Tensor.__rsub__)
def sum_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """d(a ± α·b) = da ± α·db."""
    a, b = map(_tangent, _operands(args, kwargs))
    if a is not None and b is None:
        return (-a if op is Tensor.__rsub__ else a).expand(result.shape)
    a = torch.zeros((), dtype=result.dtype, device=result.device) if a is None else a
    factor = {"alpha": kwargs["alpha"]} if "alpha" in kwargs else {}
    return op(a, b, **factor).expand(result.shape)


@tangent_rule(*_named("mul multiply __mul__ __rmul__ matmul __matmul__ __rmatmul__ mm bmm"))
def product_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """d(a·b) = da·b + a·db."""
    a, b = _operands(args, kwargs)
    left = None if _tangent(a) is None else op(_tangent(a), _primal(b))
    right = None if _tangent(b) is None else op(_primal(a), _tangent(b))
    return left if right is None else right if left is None else left + right


@tangent_rule(*_named("div divide true_divide __truediv__"))
def quotient_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """d(a/b) = (da − (a/b)·db)/b."""
    a, b = _operands(args, kwargs)
    if kwargs.get("rounding_mode"):
        return single_operation(op, args, kwargs, result)
    da, db = _tangent(a), _tangent(b)
    if db is None:
        return op(da, _primal(b))
    moved = -result * db if da is None else da - result * db
    return moved / _primal(b)


@tangent_rule(F.linear, *_named("conv1d conv2d conv3d"))
def affine_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """d(W·x + b) = W·dx, for constant W and b."""
    names = ("input", "weight", "bias")
    given = _by_name(names, args, kwargs)
    if any(isinstance(given.get(name), Lane) for name in ("weight", "bias")):
        return single_operation(op, args, kwargs, result)
    given["input"], given["bias"] = _tangent(given["input"]), None
    return op(*(given.pop(name) for name in names), *args[3:], **given)


@tangent_rule(*_named("silu"))
def silu_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """Elementwise, so the backward kernel is the derivative."""
    (x,) = _operands(args, kwargs)
    return torch.ops.aten.silu_backward(x.tangent, x.value)


@tangent_rule(*_named("square"))
def square_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """dy = 2·x·dx."""
    (x,) = _operands(args, kwargs)
    return x.value * x.tangent * 2


@tangent_rule(*_named("rsqrt"))
def rsqrt_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """dy = −½·y³·dx."""
    (x,) = _operands(args, kwargs)
    return result**3 * x.tangent * -0.5


@tangent_rule(F.layer_norm)
def layer_norm_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """With the normalised x̂ and 1/σ: dy = w·(dx − mean(dx) − x̂·mean(x̂·dx))/σ, in float32."""
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = {"eps": 1e-5, **_by_name(names, args, kwargs)}
    if any(isinstance(given.get(name), Lane) for name in ("weight", "bias")):
        return single_operation(op, args, kwargs, result)
    return _norm_tangent(given, centred=True)


@tangent_rule(F.rms_norm)
def rms_norm_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """As for `layer_norm_rule`, without means."""
    names = ("input", "normalized_shape", "weight", "eps")
    given = _by_name(names, args, kwargs)
    if isinstance(given.get("weight"), Lane):
        return single_operation(op, args, kwargs, result)
    if given.get("eps") is None:
        given["eps"] = torch.finfo(wide(given["input"].value).dtype).eps  # as PyTorch does
    return _norm_tangent(given, centred=False)


def _norm_tangent(given: Keywords, centred: bool) -> Tensor:
    dims = tuple(range(-len(given["normalized_shape"]), 0))
    x, dx = wide(given["input"].value), wide(given["input"].tangent)
    if centred:
        x, dx = x - x.mean(dims, keepdim=True), dx - dx.mean(dims, keepdim=True)
    scale = torch.rsqrt(x.square().mean(dims, keepdim=True) + given["eps"])
    unit = x * scale
    tangent = scale * (dx - unit * (unit * dx).mean(dims, keepdim=True))
    weight = given.get("weight")
    return tangent if weight is None else tangent * weight


@tangent_rule(*_named("detach"), Tensor.data.__get__)  # type: ignore[attr-defined]
def constant_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """No tangent passes."""
    return torch.zeros_like(result)


@tangent_rule(
    *_named(
        "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros "
        "new_ones new_full new_tensor"
    )
)
def factory_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """A new constant; it may be written into later."""
    return torch.zeros_like(result)


@tangent_rule(
    *_named(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
        "dropout_ alpha_dropout_ feature_dropout_ feature_alpha_dropout_"
    )
)
def dropout_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """Passes, as long as nothing is dropped: value and tangent would draw different masks."""
    given = _by_name(("input", "p", "training"), args, kwargs)
    if given.get("p", 0.5) > 0 and given.get("training", given.get("train", True)):
        raise TangentError(
            "drops values inside the JVP: value, tangent and gradient need one mask",
            "Set its probability to 0",
        )
    return given["input"].tangent


@tangent_rule(*_named("gumbel_softmax rrelu rrelu_"))
def random_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """The tangent would be that of other random numbers."""
    raise TangentError("draws random numbers inside the JVP", "Draw them outside of the network")


@tangent_rule(F.scaled_dot_product_attention)
def attention_rule(op: Operation, args: Arguments, kwargs: Keywords, result: Any) -> Any:
    """See `attention_tangent`."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = _by_name(names, args, kwargs)
    mask = given.get("attn_mask")
    if given.get("dropout_p", 0.0) > 0:
        raise TangentError("drops values inside the JVP", "Set dropout_p to 0")
    if _tangent(mask) is not None:
        raise TangentError("has a mask that depends on x or t", "Register a `tangent_rule` for it")
    q, k, v = (given[name] for name in names[:3])
    return attention_tangent(
        _primal(q),
        _primal(k),
        _primal(v),
        _tangent(q),
        _tangent(k),
        _tangent(v),
        result,
        mask=_primal(mask),
        is_causal=given.get("is_causal", False),
        scale=given.get("scale"),
        enable_gqa=given.get("enable_gqa", False),
    )
