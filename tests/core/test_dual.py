"""The tangent of one operation at a time, against `torch.func.jvp` in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import resolve_name
from torch.utils.checkpoint import checkpoint

from facm_core.jvp import TangentError, anchored_jvp, chain_jvp, rules, tangent_rule

Function = Callable[[Tensor, Tensor], Any]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, OTHER = normal(3, 4, 6, seed=1)
W, ROW, KERNEL = normal(6, 6, seed=2), normal(6, seed=3), normal(48, seed=4)
ORDER = torch.tensor([3, 0, 5, 1, 1, 2])
MHA = nn.MultiheadAttention(6, 2).double()


class Net(nn.Module):
    """A function as a network."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x, y)


def directions(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return normal(*x.shape, seed=5).to(x.dtype), normal(*y.shape, seed=6).to(y.dtype)


def carry(function: Function, x: Tensor = X, y: Tensor = Y) -> tuple[Tensor, Tensor]:
    return chain_jvp(Net(function), (x, y), directions(x, y))


def flat(result: Any) -> Tensor:
    """Everything that an operation gave, as one row of real numbers."""
    if not isinstance(result, Tensor):
        return torch.cat([flat(part) for part in result])
    return (torch.view_as_real(result) if result.is_complex() else result).double().flatten()


def gradients(call: Function, x: Tensor, y: Tensor) -> Any:
    """Of a weighted sum of what `call` gives; None where there is none."""
    inputs = [z.clone().requires_grad_() for z in (x, y)]
    value = call(*inputs)
    if not value.requires_grad:
        return None
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype)
    return torch.autograd.grad(value @ weights, inputs, allow_unused=True)


def check(function: Function, x: Tensor = X, y: Tensor = Y) -> None:
    """Value, tangent and gradient; with tangents in both arguments, the first and the second."""

    def both(x: Tensor, y: Tensor) -> Tensor:
        return flat(function(x, y)) * 3

    for call in (both, lambda z, _: both(z, y), lambda _, z: both(x, z)):
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels have no forward mode
            expected = torch.func.jvp(call, (x, y), directions(x, y))
        got = carry(call, x.clone().requires_grad_(), y.clone().requires_grad_())
        assert not got[1].requires_grad
        torch.testing.assert_close((got[0].detach(), got[1]), expected, rtol=1e-12, atol=1e-12)
        got = gradients(lambda x, y, call=call: carry(call, x, y)[0], x, y)
        torch.testing.assert_close(got, gradients(call, x, y), rtol=1e-12, atol=1e-12)


Call = Callable[[Any, Tensor, Tensor], Any]
CALLS: dict[str, Call] = {
    "view reshape": lambda op, x, y: op(x, (2, 12)),
    "view_as reshape_as expand_as type_as": lambda op, x, y: op(x, y),
    "flatten t neg negative clone detach silu square": lambda op, x, y: op(x),
    "float half bfloat16 diagonal tril triu": lambda op, x, y: op(x),
    "unflatten": lambda op, x, y: op(x, 1, (2, 3)),
    "transpose swapaxes swapdims movedim moveaxis": lambda op, x, y: op(x, 0, 1),
    "permute": lambda op, x, y: op(x, (1, 0)),
    "squeeze": lambda op, x, y: op(x[None]),
    "expand": lambda op, x, y: op(x[None], 3, -1, -1),
    "broadcast_to": lambda op, x, y: op(x, (3, 4, 6)),
    "repeat tile": lambda op, x, y: op(x, (2, 1)),
    "repeat_interleave roll": lambda op, x, y: op(x, 2, 1),
    "contiguous": lambda op, x, y: op(x.T),
    "chunk tensor_split split": lambda op, x, y: op(x, 2, 1),
    "unsqueeze unbind sum mean cumsum": lambda op, x, y: op(x, 1),
    "select": lambda op, x, y: op(x, 1, 2),
    "narrow": lambda op, x, y: op(x, 1, 2, 3),
    "gather": lambda op, x, y: op(x, 1, x.argsort(1)),
    "take_along_dim": lambda op, x, y: op(x, x.argsort(1), 1),
    "index_select": lambda op, x, y: op(x, 1, y[0].argsort()),
    "__getitem__": lambda op, x, y: [op(x, (slice(1, None), y[0] > 0)), op(x, x > y)],
    "cat concat concatenate stack hstack vstack": lambda op, x, y: op([x, OTHER, y]),
    "flip": lambda op, x, y: op(x, (1,)),
    "pixel_shuffle": lambda op, x, y: op(x.view(4, 2, 3), 2),
    "pixel_unshuffle": lambda op, x, y: op(x[None], 2),
    "to": lambda op, x, y: op(x, torch.float32),
    "double": lambda op, x, y: op(x.float()),
    "real imag view_as_real __get__": lambda op, x, y: op(torch.complex(x, y)),
    "view_as_complex": lambda op, x, y: op(torch.stack([x, y], -1)),
    "add __add__ __radd__ sub subtract __sub__ __rsub__": lambda op, x, y: op(x, y),
    "mul multiply __mul__ __rmul__ div divide true_divide __truediv__": lambda op, x, y: op(x, y),
    "matmul __matmul__ __rmatmul__ mm": lambda op, x, y: op(x, y.T),
    "bmm": lambda op, x, y: op(x[None], y.T[None]),
    "linear": lambda op, x, y: op(x, W, ROW),
    "conv1d": lambda op, x, y: op(x[None], KERNEL.view(4, 4, 3), ROW[:4], 2),
    "conv2d": lambda op, x, y: op(x.view(1, 2, 3, 4), KERNEL.view(6, 2, 2, 2), ROW),
    "conv3d": lambda op, x, y: op(x.view(1, 2, 3, 2, 2), KERNEL.view(6, 2, 2, 2, 1), ROW),
    "rsqrt": lambda op, x, y: op(x.exp()),
    "layer_norm": lambda op, x, y: [op(x, (6,), ROW, ROW, 0.1), op(x, (4, 6))],
    "rms_norm": lambda op, x, y: [op(x, (6,), ROW, 0.1), op(x, (4, 6))],
    "empty_like zeros_like ones_like rand_like randn_like": lambda op, x, y: op(x).fill_(2) * x,
    "full_like": lambda op, x, y: op(x, 2.0) * x,
    "new_empty new_zeros new_ones": lambda op, x, y: op(x, (4, 6)).fill_(2) * x,
    "new_full": lambda op, x, y: op(x, (4, 6), 2.0) * x,
    "new_tensor": lambda op, x, y: op(x, [2.0]) * x,
    "dropout alpha_dropout": lambda op, x, y: [op(x, 0.0, True), op(x, 0.5, False)],
    "feature_dropout dropout1d feature_alpha_dropout": lambda op, x, y: op(x[None], 0.0, True),
    "dropout2d": lambda op, x, y: op(x.view(1, 2, 3, 4), 0.0, True),
    "dropout3d": lambda op, x, y: op(x.view(1, 2, 3, 2, 2), 0.0, True),
    "dropout_ alpha_dropout_": lambda op, x, y: op(x * 1, 0.0, True),
    "feature_dropout_ feature_alpha_dropout_": lambda op, x, y: op(x[None] * 1, 0.0, True),
    "scaled_dot_product_attention": lambda op, x, y: op(
        x.view(1, 2, 4, 3), y.view(1, 2, 4, 3), (x * y).view(1, 2, 4, 3)
    ),
}
CALL_OF = {name: call for names, call in CALLS.items() for name in names.split()}
RANDOM = {"gumbel_softmax", "rrelu", "rrelu_"}


@pytest.mark.parametrize("operation", list(rules.RULES), ids=resolve_name)
def test_a_rule(operation: Any) -> None:
    name = operation.__name__
    if name in RANDOM:
        with pytest.raises(TangentError, match="draws random numbers"):
            carry(lambda x, y: operation(x))
    else:
        check(lambda x, y: CALL_OF[name](operation, x, y))


UNREGISTERED: dict[str, Function] = {
    "gelu": lambda x, y: [F.gelu(x), F.gelu(y, approximate="tanh")],
    "other activations": lambda x, y: [
        F.mish(x),
        F.elu(x),
        F.softplus(y),
        F.hardswish(y),
        F.glu(x),
    ],
    "relu": lambda x, y: [F.relu(x), F.leaky_relu(y, 0.1), x.abs(), F.relu6(y)],
    "norms": lambda x, y: [
        F.group_norm(x, 3, ROW, ROW),
        F.instance_norm(x[None]),
        F.normalize(y),
        F.layer_norm(x, (6,), y[0], y[1]),
        F.rms_norm(x, (6,), y[0]),
    ],
    "softmax": lambda x, y: [x.softmax(-1), F.log_softmax(y, 0), torch.logsumexp(x, 1)],
    "exp log": lambda x, y: [x.exp(), torch.log1p(y * y), torch.expm1(x), (y * y).log()],
    "cos sin": lambda x, y: [x.cos(), torch.sin(y), x.tan(), torch.atan2(x, y), torch.sinc(x)],
    "sigmoid tanh erf": lambda x, y: [x.sigmoid(), F.logsigmoid(y), x.tanh(), y.erf()],
    "pow": lambda x, y: [x**3, x.abs() ** y, 2**y, torch.pow(x, 2), x.exp() ** 0.5],
    "sqrt reciprocal": lambda x, y: [x.exp().sqrt(), 1 / y, x.reciprocal(), torch.hypot(x, y)],
    "clamp": lambda x, y: [x.clamp(-0.5, 0.5), torch.clamp(x, min=y), y.clamp(max=x), x.clip(0)],
    "where": lambda x, y: [
        torch.where(x > 0, x, y),
        x.where(OTHER > 0, 0.5),
        y.masked_fill(x > y, 2),
    ],
    "maximum": lambda x, y: [torch.maximum(x, y), torch.minimum(x, OTHER), x.fmax(y), x.amax(1)],
    "max": lambda x, y: [x.max(1).values, torch.min(y, 0)[0], x.max(), *y.sort(1)[:1]],
    "topk": lambda x, y: [x.topk(2).values, y.gather(1, torch.topk(x, 2).indices), y.median(1)[0]],
    "argmax": lambda x, y: [x[torch.arange(4), y.argmax(1)], F.one_hot(x.argmax(1), 6) * y],
    "not differentiable": lambda x, y: [
        x.round(),
        y.floor(),
        x.sign(),
        x > y,
        x.argsort(),
        x.long(),
    ],
    "einsum": lambda x, y: [torch.einsum("ij,kj->ik", x, y), torch.einsum("ij,jk", x, W)],
    "addmm": lambda x, y: [
        torch.addmm(x, y, W, beta=2),
        torch.addmm(ROW, x, W),
        x[0].addmv(W, y[0]),
    ],
    "baddbmm": lambda x, y: [torch.baddbmm(x[None], y[None], W[None], alpha=3)],
    "other products": lambda x, y: [
        torch.outer(x[0], y[0]),
        x[0] @ y[0],
        torch.kron(x, y),
        x @ y[0],
    ],
    "addcmul": lambda x, y: [x.addcmul(y, OTHER, value=2), x.addcdiv(y, OTHER), x.lerp(y, 0.3)],
    "var std": lambda x, y: [x.var(1), y.std(), *torch.var_mean(x, 0, correction=0)],
    "norm": lambda x, y: [x.norm(), y.norm(dim=1, keepdim=True), torch.linalg.vector_norm(x, 1, 0)],
    "distances": lambda x, y: [F.mse_loss(x, y), F.cosine_similarity(x, y)],
    "pad": lambda x, y: [F.pad(x, (1, 2), value=3.0), F.pad(y[None], (1, 1), "reflect")],
    "interpolate": lambda x, y: [
        F.interpolate(x[None], 9, mode="linear"),
        F.interpolate(y[None, None], scale_factor=2.0, mode="bicubic"),
        F.interpolate(x[None], scale_factor=2),
    ],
    "pooling": lambda x, y: [
        F.avg_pool2d(x[None], 2),
        F.max_pool2d(y[None], 2),
        F.adaptive_avg_pool1d(x, 2),
    ],
    "cumulative": lambda x, y: [
        x.cumprod(1),
        y.logcumsumexp(1),
        x.prod(1),
        x.cummax(1).values,
        x.diff(),
    ],
    "unfold": lambda x, y: [
        x.unfold(1, 3, 2),
        F.unfold(x[None, None], 2),
        F.fold(y[None], (2, 7), 2),
    ],
    "transposed convolution": lambda x, y: (
        F.conv_transpose1d(x[None], KERNEL.view(4, 4, 3)) * y.sum()
    ),
    "scatter": lambda x, y: [
        x.scatter(1, ORDER.expand(4, 6), y),
        x.scatter_add(1, ORDER.expand(4, 6), y),
        x.index_add(1, ORDER, y),
        x.index_copy(1, ORDER.sort()[1], y),
        x.index_fill(1, ORDER, 2.0),
        x.index_put((ORDER % 4, ORDER), y[0]),
        x.masked_select(y > 0),
    ],
    "complex": lambda x, y: [
        torch.polar(x.exp(), y),
        torch.complex(x, y) * (1 + 2j),
        torch.fft.rfft(x),
    ],
    "complex and real": lambda x, y: torch.cat([torch.complex(x, y), torch.ones(4, 6) + 1j]) * x[0],
    "linear algebra": lambda x, y: [
        torch.linalg.solve(W, x.T),
        torch.linalg.det(y @ x.T),
        x.trace(),
    ],
    "attention module": lambda x, y: MHA(x[:, None], y[:, None], x[:, None], need_weights=False)[0],
    "attention module with weights": lambda x, y: MHA(x[:, None], y[:, None], x[:, None]),
    "detach": lambda x, y: [x.detach() * y, y.data * x],
    "conversions": lambda x, y: [
        torch.as_tensor(x),
        x.to(y),
        x.float() * y,
        x.to("cpu", copy=True),
    ],
    "aten": lambda x, y: [torch.ops.aten.mul(x, y), torch.ops.aten.sin.default(x)],
    "iteration": lambda x, y: [row * i for i, row in enumerate(x)],
    "meshgrid": lambda x, y: torch.meshgrid(x[0], y[0], indexing="ij"),
    "random": lambda x, y: x * torch.rand_like(y).fill_(0.5) + torch.zeros_like(x).normal_() * 0,
}


@pytest.mark.parametrize("name", UNREGISTERED)
def test_an_operation_without_a_rule_of_its_own(name: str) -> None:
    check(UNREGISTERED[name])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x + 2, 2 + x, y - 2, 2 - y, torch.rsub(x, 2), torch.add(x, 2, alpha=3)],
        lambda x, y: [x * 2, 2 * y, x / 2, 2 / y, x % 0.7, -x, +y, x**2, 2**y, x * True],
        lambda x, y: [
            x * np.float64(2),
            x @ W,
            W @ y.T,
            x + ORDER,
            ORDER * y,
            ORDER / y,
            x / ORDER,
        ],
        lambda x, y: [W[0].float() * x, x - W[1].float(), x.float() * y, torch.tensor(2) * y],
    ],
    ids=["sums", "products", "constants", "types"],
)
def test_constants_on_either_side(function: Function) -> None:
    check(function)


@pytest.mark.parametrize(
    ("x", "y"),
    [(X, ROW), (X[:, :1], Y[:1]), (X[0, 0], Y), (X[:, None], Y), (X[0], Y[:, :1])],
    ids=["row", "outer", "number", "rank", "column"],
)
def test_broadcasting(x: Tensor, y: Tensor) -> None:
    check(lambda x, y: [x + y, x - y, y - x, x * y, x / y, y / x, torch.sub(x, y, alpha=2)], x, y)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [torch.add(x, other=y, alpha=2), torch.add(alpha=2, other=y, input=x)],
        lambda x, y: [torch.sub(other=y, input=x, alpha=3), x.sub(other=y), x.add(other=OTHER)],
        lambda x, y: [
            torch.mul(other=y, input=x),
            torch.matmul(other=y.T, input=x),
            x.mul(other=2),
        ],
        lambda x, y: [torch.mm(x, mat2=y.T), torch.bmm(mat2=y.T[None], input=x[None])],
        lambda x, y: [torch.div(x, other=y), torch.div(other=y, input=x, rounding_mode=None)],
        lambda x, y: [
            torch.div(x, y, rounding_mode="floor"),
            torch.div(x, y, rounding_mode="trunc"),
        ],
        lambda x, y: [F.linear(weight=W, input=x), F.linear(x, y), F.linear(x, W, bias=y[0])],
        lambda x, y: F.conv1d(x[None], padding=1, bias=ROW[:4], weight=KERNEL.view(4, 4, 3)),
        lambda x, y: F.conv1d(x[None], y.view(2, 4, 3), padding="same"),
        lambda x, y: [F.silu(input=x), torch.square(input=y), torch.rsqrt(input=x.exp())],
        lambda x, y: F.layer_norm(eps=0.1, weight=ROW, input=x, normalized_shape=(6,)),
        lambda x, y: F.rms_norm(eps=0.1, weight=ROW, input=x, normalized_shape=(6,)),
        lambda x, y: [torch.cat(dim=1, tensors=[x, y]), torch.sum(dim=0, input=x, keepdim=True)],
        lambda x, y: F.scaled_dot_product_attention(value=x, key=y, query=OTHER, scale=2.0),
        lambda x, y: F.scaled_dot_product_attention(x, y, x, is_causal=True),
        lambda x, y: F.scaled_dot_product_attention(
            x, y, y, (OTHER @ OTHER.T > 0).fill_diagonal_(True)
        ),
    ],
)
def test_arguments_by_name(function: Function) -> None:
    check(function)


def written(write: Callable[[Tensor, Tensor], Any]) -> Function:
    """What a new tensor z = x + 0·y holds after ``write(z, y)``."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x + 0 * y
        write(z, y)
        return z

    return function


def rotated(x: Tensor, y: Tensor) -> list[Tensor]:
    """As diffusers writes rotary embeddings."""
    out, other = torch.empty_like(x + y), (x + y).new_zeros(4, 6)
    out[..., 0::2] = -x[..., 1::2] * ROW[0::2]
    out[..., 1::2] = x[..., 0::2] * y[..., 1::2]
    other[1:, 0::2] = 1.0
    other[:1] = x[:1] + y[1:2]
    return [out, other]


IN_PLACE = {
    "add": written(lambda z, y: z.add_(y, alpha=2)),
    "constant": written(lambda z, y: z.mul_(OTHER)),
    "power": written(lambda z, y: z.pow_(2)),
    "several": written(lambda z, y: z.div_(y).sub_(1).clamp_(0.5, 2).addcmul_(y, y).exp_()),
    "copy": written(lambda z, y: z.copy_(y)),
    "fill": written(lambda z, y: z.fill_(3.0)),
    "masked fill": written(lambda z, y: z.masked_fill_(z > y, 0.0)),
    "silu": written(lambda z, y: F.silu(z, inplace=True)),
    "elu": written(lambda z, y: F.elu(z, 0.7, True)),
    "module": written(lambda z, y: nn.LeakyReLU(0.1, inplace=True)(z)),
    "item": written(lambda z, y: z.__setitem__((slice(1), slice(None, None, 2)), y[0, ::2])),
    "item of a constant": written(lambda z, y: z.__setitem__(0, ROW)),
    "item by mask": written(lambda z, y: z.__setitem__(z > y, 0.25)),
    "index add": written(lambda z, y: z.index_add_(1, ORDER, y)),
    "shape": lambda x, y: (x * 1).unsqueeze_(0).transpose_(1, 2) * y.T,
    "view made afterwards": lambda x, y: (x + y).mul_(y)[0].sin(),
    "rotary embedding": rotated,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_writing_in_place(name: str) -> None:
    check(IN_PLACE[name])


def test_a_tensor_times_itself_in_place() -> None:
    """Where `torch.func.jvp` of PyTorch 2.15 is wrong: it reads the tangent that it has written."""
    _, tangent = carry(written(lambda z, y: z.mul_(z)))
    torch.testing.assert_close(tangent, 2 * X * directions(X, Y)[0], rtol=1e-12, atol=1e-12)


def test_operators_in_place() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x + 0 * y
        z += y
        z *= x
        z -= 2
        z /= y
        z **= 3
        z %= 0.7
        mask = z > 0
        mask &= y > 0
        return z * mask

    check(function)


def write_view_then_read_base(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z[0].mul_(y[0])
    return z


def write_base_then_read_view(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    view = z[0]
    z.mul_(y)
    return view


def write_plain(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(4, 6, dtype=torch.float64)
    out[0] = x[0]
    return out


class Cube(torch.autograd.Function):
    """With twice the gradient, to tell it from that of its forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * 3 * x * x


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Scale(torch.autograd.Function):
    """Two inputs, two outputs, in the style with `setup_context`."""

    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return x * factor, factor * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return gradient * factor, gradient * x


PARAMETER = nn.Parameter(ROW.clone())


@torch.library.custom_op("test_dual::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("test_dual::halve", mutates_args=("x",))
def halve(x: Tensor) -> None:
    x.div_(2)


cube.register_autograd(
    lambda ctx, gradient: 3 * gradient * ctx.saved_tensors[0] ** 2,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

REFUSED: dict[str, tuple[Function, str]] = {
    "written view": (write_view_then_read_base, "the output uses .* another view of it. Write out"),
    "written view, read": (lambda x, y: write_view_then_read_base(x, y) + 1, "another view of it"),
    "written base": (write_base_then_read_view, "another view of it"),
    "written alias": (written(lambda z, y: z.detach().mul_(2)), "another view of it"),
    "plain target": (write_plain, "__setitem__ writes what depends .* made without .* empty_like"),
    "plain list": (lambda x, y: torch._foreach_mul_([x * 1], 2.0), "writes what depends"),
    "out": (lambda x, y: torch.mul(x, y, out=torch.empty(0)), "torch.mul writes into .* `out`"),
    "data": (lambda x, y: setattr(x * 1, "data", y), "data.__set__ leads past"),
    "data_ptr": (lambda x, y: x * x.data_ptr(), "Tensor.data_ptr leads past .* `tangent_rule`"),
    "numpy": (lambda x, y: torch.from_numpy(x.detach().numpy()), "Tensor.numpy leads past"),
    "array": (lambda x, y: x * np.asarray(y.detach()).sum(), "__array__ leads past"),
    "dlpack": (lambda x, y: torch.from_dlpack(x), "__dlpack__ leads past"),
    "copy": (lambda x, y: copy.copy(x * 1), "__reduce_ex__ leads past"),
    "hook": (lambda x, y: x.register_hook(lambda g: 2 * g), "register_hook leads past"),
    "vmap": (lambda x, y: torch.vmap(torch.sin)(x), "aten.sin.* is called past"),
    "function": (lambda x, y: Cube.apply(x) * y, "Tensor.mul uses what CubeBackward .* recompute"),
    "function at the end": (lambda x, y: Cube.apply(x * y), "the output uses what CubeBackward"),
    "identity function": (lambda x, y: Same.apply(x * y), "uses what SameBackward"),
    "function of two": (lambda x, y: Scale.apply(x, y)[0] + 1, "uses what ScaleBackward"),
    "function of a parameter": (lambda x, y: Scale.apply(x, PARAMETER)[0] + y, "ScaleBackward"),
    "reentrant checkpoint": (
        lambda x, y: checkpoint(torch.mul, x, y, use_reentrant=True),
        "uses what CheckpointFunctionBackward",
    ),
    "custom operator": (
        lambda x, y: cube(x),
        "test_dual.cube.* has no forward-mode .* `tangent_rule`",
    ),
    "custom operator by name": (lambda x, y: torch.ops.test_dual.cube(x), "no forward-mode"),
    "custom operator in place": (
        lambda x, y: halve(x * 1),
        "test_dual.halve.* changes its argument",
    ),
    "no derivative": (lambda x, y: torch.cdist(x, y), "torch.functional.cdist has no forward-mode"),
    "dropout": (lambda x, y: F.dropout(x, 0.1), "functional.dropout drops values"),
    "dropout in place": (lambda x, y: torch.dropout_(x * 1, 0.1, True), "drops values"),
    "dropped features": (lambda x, y: F.feature_alpha_dropout(x, 0.1, True), "drops values"),
    "dropped attention": (
        lambda x, y: F.scaled_dot_product_attention(x, y, y, dropout_p=0.1),
        "scaled_dot_product_attention drops values",
    ),
    "mask that depends on x": (
        lambda x, y: F.scaled_dot_product_attention(x, y, y, x @ y.T),
        "has a mask that depends on x or t",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_carries_no_tangent_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    with pytest.raises(TangentError, match=message):
        carry(function, X.clone().requires_grad_(), Y.clone().requires_grad_())


def test_a_custom_function_without_gradients() -> None:
    """Its operations are carried like all others."""
    expected = torch.func.jvp(lambda x, y: x**3 * y, (X, Y), directions(X, Y))
    with torch.no_grad():
        under_no_grad = carry(lambda x, y: Cube.apply(x) * y, X.clone().requires_grad_())
    for got in (carry(lambda x, y: Cube.apply(x) * y), under_no_grad):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_custom_function_in_a_recomputed_block() -> None:
    """The backward pass is the function's own."""
    net = Net(lambda x, y: block(x, y) * 2)
    block = net.block = Net(lambda x, y: Cube.apply(x) * y)
    net.blocks = [block]
    x = X.clone().requires_grad_()
    value, tangent = chain_jvp(net, (x, Y), directions(X, Y), recompute=True)
    expected = torch.func.jvp(lambda x, y: 2 * x**3 * y, (X, Y), directions(X, Y))
    torch.testing.assert_close((value.detach(), tangent), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], 2 * 2 * 3 * X**2 * Y)


def test_a_custom_function_of_constants() -> None:
    """It never meets a dual tensor, and has its own gradient."""
    value, _ = carry(lambda x, y: x * Cube.apply(PARAMETER))
    got = torch.autograd.grad(value.sum(), PARAMETER)[0]
    torch.testing.assert_close(got, 2 * 3 * ROW**2 * X.sum(0))


def test_a_rule_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))

    @tangent_rule(cube)
    def cube_rule(operation: Any, args: Any, kwargs: Any, result: Tensor) -> Tensor:
        assert operation is torch.ops.test_dual.cube.default
        (x,) = args
        torch.testing.assert_close(result, x.value**3)
        return 3 * x.value**2 * x.tangent

    for got, expected in (
        (carry(lambda x, y: cube(x) * y), carry(lambda x, y: x**3 * y)),
        (
            gradients(lambda x, y: flat(carry(lambda x, y: cube(x) * y, x, y)[0]), X, Y),
            gradients(lambda x, y: flat(x**3 * y), X, Y),
        ),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def half_recorded(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = x.sin() * y
    return z * x


def test_a_section_without_gradients() -> None:
    """Stops the gradient and, as in `torch.func.jvp`, no tangent."""
    check(half_recorded)
    with torch.no_grad():
        expected = torch.func.jvp(lambda x, y: x.sin() * y * x, (X, Y), directions(X, Y))
    assert torch.equal(carry(half_recorded)[1], expected[1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_inside_runs_as_it_stands(backend: str) -> None:
    """It is compiled for plain tensors only."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * y).exp()

    compiled = torch.compile(function, backend=backend)
    for x in (X, X.clone().requires_grad_()):
        for got, expected in zip(carry(compiled, x), carry(function, x), strict=True):
            assert torch.equal(got, expected)
    torch.testing.assert_close(compiled(X, Y), function(X, Y))


LANES: dict[str, Function] = {
    "operations": lambda x, y: (x @ W).sin() * y + x.softmax(-1),
    "several results": lambda x, y: torch.cat([x.max(1).values, *y.chunk(2, 1)[0].unbind(0)]),
    "indices": lambda x, y: x.gather(1, y.argsort(1)),
    "in place": IN_PLACE["several"],
    "rotary embedding": lambda x, y: torch.stack(rotated(x, y)),
    "steered alike": lambda x, y: x * y if (x * x).min() >= 0 else x + y,
    "only y": lambda x, y: y.exp(),
    "norm": lambda x, y: F.layer_norm(x, (6,), ROW, ROW) * y,
}


@pytest.mark.parametrize("name", LANES)
def test_two_lanes_are_two_evaluations(name: str) -> None:
    function, inputs = LANES[name], [z.clone().requires_grad_() for z in (X, Y, OTHER, 2 * Y)]
    x, y, at_x, at_y = inputs
    along = directions(X, Y)
    got = anchored_jvp(Net(function), (at_x, at_y), (x, y), along)
    value, tangent = chain_jvp(Net(function), (x, y), along)
    expected = (function(at_x, at_y), value, tangent)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not got[2].requires_grad
    losses = (outputs[0].square().sum() + outputs[1].sin().sum() for outputs in (got, expected))
    gradients = (torch.autograd.grad(loss, inputs, allow_unused=True) for loss in losses)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y: x if x[0, 0] > 0 else y, "__bool__ steers Python by values that differ"),
        (lambda x, y: x * y[0, 0].item(), "Tensor.item steers Python"),
        (lambda x, y: x * sum(y[0].tolist()), "Tensor.tolist steers Python"),
        (lambda x, y: x[x > 1], "__getitem__ has shapes or types that differ"),
    ],
)
def test_lanes_that_part_are_refused(function: Function, message: str) -> None:
    with pytest.raises(TangentError, match=message):
        anchored_jvp(Net(function), (-X, -Y), (X, Y), directions(X, Y))
    carry(function)


def test_a_single_lane_may_steer_python() -> None:
    check(lambda x, y: x * y[0, 0].item() if x.max() > 0 else x * float(y.sum()) + len(y.tolist()))


BIAS = ROW.bfloat16()
LOW_PRECISION: dict[str, Function] = {
    "layer_norm": lambda x, y: F.layer_norm(x, (6,), y[0], y[1]),
    "layer_norm of constants": lambda x, y: F.layer_norm(
        x, (6,), BIAS.to(x.dtype), BIAS.to(x.dtype)
    ),
    "rms_norm": lambda x, y: F.rms_norm(x, (6,), y[0], 0.1),
    "rms_norm by default": lambda x, y: F.rms_norm(x / 64, (6,)),
    "group_norm": lambda x, y: F.group_norm(x, 3),
    "softmax": lambda x, y: x.softmax(-1),
    "gelu": lambda x, y: F.gelu(x),
    "logsumexp": lambda x, y: x.logsumexp(-1),
}


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision_loses_only_the_rounding_of_the_result(name: str) -> None:
    function, x, y = LOW_PRECISION[name], (X + 3).bfloat16(), Y.bfloat16()
    value, tangent = carry(function, x, y)
    assert value.dtype == tangent.dtype == torch.bfloat16
    along = (d.bfloat16().double() for d in directions(X, Y))
    _, expected = torch.func.jvp(function, (x.double(), y.double()), tuple(along))
    torch.testing.assert_close(tangent.double(), expected, rtol=2**-8, atol=1e-5)
