"""The tangent of attention against `torch.func.jvp` of the plain formula, in float64.

Run as a program, this file prints what the Triton kernel gives without a GPU (see `kernel`).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from facm_core.jvp import attention
from facm_core.jvp.attention import attention_tangent

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and options of one call.

    Attributes:
        k: Shape of k; that of q by default.
        v: Shape of v; that of k by default.
        tangents: Which of dq, dk, dv are given.
        mask: Shape of a mask. Where it has rows, row 1 shows no key and row 2 only the last one.
        additive: Whether the mask is a summand.
        transposed: Whether heads come after tokens in memory, as out of a projection.
    """

    q: Shape = (2, 2, 37, 8)
    k: Shape = ()
    v: Shape = ()
    tangents: str = "qkv"
    mask: Shape | None = None
    additive: bool = False
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    transposed: bool = False
    shift: float = 0.0

    def inputs(self, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        """(q, k, v, dq, dk, dv, out), and the options."""
        generator = torch.Generator().manual_seed(7)
        randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)

        def draw(shape: Shape) -> Tensor:
            x = randn(shape).to(dtype)
            return x.transpose(-2, -3).contiguous().transpose(-2, -3) if self.transposed else x

        k_shape = self.k or self.q
        shapes = [self.q, k_shape, self.v or k_shape]
        q, k, v, *tangents = map(draw, shapes * 2)
        k = k + self.shift
        given = [
            x if name in self.tangents else None for name, x in zip("qkv", tangents, strict=True)
        ]
        mask = None
        if self.mask is not None:
            mask = randn(self.mask)
            shown = mask > -0.5
            if self.mask[-2] > 1:
                shown[..., 1, :] = False
                shown[..., 2, :] = torch.arange(self.mask[-1]) == self.mask[-1] - 1
            mask = mask.to(dtype).masked_fill(~shown, -torch.inf) if self.additive else shown
        options = {
            "is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.enable_gqa
        }  # fmt: skip
        out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        return [q, k, v, *given, out], {"mask": mask, **options}


CROSS: dict[str, Any] = {"q": (2, 2, 37, 8), "k": (2, 2, 45, 8)}
GROUPED: dict[str, Any] = {"q": (1, 4, 37, 8), "k": (1, 2, 45, 8), "enable_gqa": True}
CASES = {
    "self": Case(),
    "cross": Case(**CROSS),
    "constant keys and values": Case(**CROSS, tangents="q"),
    "values of another size": Case(**CROSS, v=(2, 2, 45, 20)),
    "transposed": Case(**CROSS, transposed=True),
    "odd sizes": Case(q=(1, 2, 1, 3), k=(1, 2, 1, 3), v=(1, 2, 1, 1)),
    "no keys": Case(q=(1, 2, 5, 3), k=(1, 2, 0, 3)),
    "no leading dimension": Case(q=(37, 8), k=(45, 8)),
    "heads only": Case(q=(3, 37, 8)),
    "five dimensions": Case(q=(2, 2, 2, 9, 8), k=(2, 2, 2, 5, 8), mask=(2, 1, 1, 9, 5)),
    "six dimensions": Case(q=(2, 2, 1, 2, 9, 8), k=(2, 2, 1, 2, 5, 8), mask=(2, 1, 1, 2, 1, 5)),
    "leading dimensions broadcast": Case(q=(2, 1, 9, 8), k=(1, 3, 5, 8), v=(3, 5, 8)),
    "mask": Case(**CROSS, mask=(37, 45)),
    "mask of keys": Case(**CROSS, mask=(2, 1, 1, 45)),
    "mask per head": Case(**CROSS, mask=(1, 2, 37, 45)),
    "mask of queries": Case(**CROSS, mask=(37, 1)),
    "additive": Case(**CROSS, mask=(37, 45), additive=True),
    "additive per head": Case(**CROSS, mask=(2, 1, 45), additive=True),
    "causal": Case(is_causal=True),
    "causal, more keys": Case(**CROSS, is_causal=True),
    "causal, more queries": Case(q=(2, 2, 37, 8), k=(2, 2, 20, 8), is_causal=True),
    "scale": Case(scale=0.7),
    "grouped": Case(**GROUPED),
    "grouped, mask": Case(**GROUPED, mask=(37, 45)),
    "grouped, mask of keys": Case(**GROUPED, mask=(1, 1, 1, 45)),
    "grouped, mask per head": Case(**GROUPED, mask=(1, 4, 37, 45)),
    "grouped, additive": Case(**GROUPED, mask=(37, 45), additive=True),
    "grouped, no batch": Case(q=(4, 9, 8), k=(2, 5, 8), enable_gqa=True),
}  # fmt: skip
for size in range(4):
    for names in itertools.combinations("qkv", size):
        CASES[f"tangents: {''.join(names) or None}"] = Case(**CROSS, tangents="".join(names))


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """As the documentation of `scaled_dot_product_attention` defines it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if is_causal:
            shown = shown.tril()
        elif mask is not None:
            shown = mask if mask.dtype == torch.bool else mask > -torch.inf
            if mask.dtype != torch.bool:
                scores = scores + mask.double()
        weights = scores.exp() * shown
        return weights / weights.sum(-1, keepdim=True).clip(min=1e-300) @ v

    primals = tuple(x.double() for x in (q, k, v))
    tangents = tuple(
        torch.zeros_like(x) if dx is None else dx.double()
        for x, dx in zip(primals, (dq, dk, dv), strict=True)
    )
    return torch.func.jvp(attend, primals, tangents)[1]


def error(case: Case, dtype: torch.dtype) -> float:
    """Norm of the difference to the oracle over the oracle's norm."""
    args, options = case.inputs(dtype)
    got, expected = attention_tangent(*args, **options), oracle(*args[:6], **options)
    assert got.shape == args[-1].shape
    assert got.dtype == dtype
    assert got.is_contiguous()
    return float((got - expected).norm() / expected.norm().clip(min=1e-300))


@pytest.mark.parametrize("budget", [1, 300, 8_000, attention.BLOCK_ELEMENTS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_formula(case: Case, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one query, of some, of some heads, and one block."""
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", budget)
    assert error(case, torch.float64) < 1e-13


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-7), (torch.float16, 3e-4), (torch.bfloat16, 2e-3)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_narrow_types_lose_only_the_rounding_of_the_result(
    case: Case, dtype: torch.dtype, bound: float
) -> None:
    assert error(case, dtype) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-4), (torch.bfloat16, 2e-3)])
def test_a_common_part_of_the_slopes_cancels(dtype: torch.dtype, bound: float) -> None:
    """Keys with a common part give dS one that the softmax does not see."""
    assert error(Case(**CROSS, shift=20.0), dtype) < bound


def test_equals_finite_differences() -> None:
    (q, k, v, dq, dk, dv, out), _ = Case(**CROSS).inputs(torch.float64)
    h = 1e-5
    ahead, behind = (
        F.scaled_dot_product_attention(q + s * dq, k + s * dk, v + s * dv) for s in (h, -h)
    )
    got = attention_tangent(q, k, v, dq, dk, dv, out)
    torch.testing.assert_close(got, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


def test_a_query_without_keys_has_no_tangent() -> None:
    args, options = CASES["mask"].inputs(torch.float64)
    got = attention_tangent(*args, **options)
    assert torch.equal(got[..., 1, :], torch.zeros_like(got[..., 1, :]))
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["cross", "mask", "additive", "causal, more keys"])
def test_what_is_not_finite_shows(name: str) -> None:
    args, options = CASES[name].inputs(torch.float64)
    args[0][0, 0, 5, 0] = torch.nan
    got = attention_tangent(*args, **options)
    assert got[0, 0, 5].isnan().all()
    assert got.isnan().sum() == got.shape[-1]


def test_nothing_is_recorded() -> None:
    args, _ = CASES["self"].inputs(torch.float64)
    got = attention_tangent(*(x.requires_grad_() for x in args))
    assert not got.requires_grad


def test_autocast_changes_only_the_type_of_the_result() -> None:
    """There the attention itself gives bfloat16."""
    args, _ = CASES["self"].inputs(torch.float32)
    expected = attention_tangent(*args).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_tangent(*args[:6], F.scaled_dot_product_attention(*args[:3]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dq": torch.zeros(5, 3)}, r"tangent dq has shape \(5, 3\), but q has \(2, 5, 3\)"),
        ({"dv": torch.zeros(2, 7, 3)}, "tangent dv has shape"),
        ({"out": torch.zeros(2, 5, 4)}, r"out has shape \(2, 5, 4\), but .* give \(2, 5, 3\)"),
        ({"is_causal": True, "mask": torch.ones(5, 6, dtype=torch.bool)}, "is_causal = True"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    q, k = torch.zeros(2, 5, 3), torch.zeros(2, 6, 3)
    given = {"q": q, "k": k, "v": k, "dq": q, "dk": k, "dv": k, "out": q} | changes
    with pytest.raises(ValueError, match=message):
        attention_tangent(**given)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most memory that is allocated at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("kind", ["plain", "masked", "causal"])
@pytest.mark.parametrize(
    ("b", "n", "m"), [(1, 2048, 2048), (1, 8, 40_000), (1, 40_000, 8), (500, 1, 50)]
)
def test_memory_is_linear_in_tokens(
    b: int, n: int, m: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = 50_000
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", budget)
    q, dq, out = torch.ones(3, b, 2, n, 4, dtype=torch.bfloat16)
    k, v, dk, dv = torch.ones(4, b, 2, m, 4, dtype=torch.bfloat16)
    mask = torch.ones(m, dtype=torch.bool).expand(n, m) if kind == "masked" else None
    used = peak_bytes(
        lambda: attention_tangent(q, k, v, dq, dk, dv, out, mask=mask, is_causal=kind == "causal")
    )
    blocks = (2 * 4 + 2) * budget  # float32 and bool
    operands = 4 * 4 * max(budget, (n + m) * 8)  # values, tangents; of this block and the last
    assert used <= blocks + operands + out.nbytes


@pytest.mark.parametrize("name", ["transposed", "constant keys and values", "grouped, mask"])
def test_is_one_operator(name: str) -> None:
    args, options = CASES[name].inputs(torch.float32)
    graph = make_fx(lambda *args: attention_tangent(*args, **options))(*args).graph
    operator = torch.ops.facm_core.attention_tangent.default
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [operator]
    torch.library.opcheck(operator, (*args, *(options | {"scale": 0.5}).values()))


def test_compiles_without_graph_breaks() -> None:
    args, options = CASES["grouped, mask"].inputs(torch.float32)
    compiled = torch.compile(attention_tangent, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args, **options), attention_tangent(*args, **options))


@pytest.mark.parametrize("name", ["transposed", "grouped, mask", "tangents: None"])
def test_runs_on_the_meta_device(name: str) -> None:
    args, options = CASES[name].inputs(torch.bfloat16)
    expected = attention_tangent(*args, **options)
    args, options["mask"] = tree_map_only(Tensor, lambda x: x.to("meta"), (args, options["mask"]))
    got = attention_tangent(*args, **options)
    assert got.is_meta
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.stride() == expected.stride()


# --- the kernel without a GPU: interpreted, or compiled and not run -----------------------------

LARGE: dict[str, Any] = {"q": (1, 1, 130, 40), "k": (1, 1, 70, 40)}
ALONE = (  # what the kernel does itself, beyond the views that it is given
    "transposed", "values of another size", "odd sizes", "six dimensions",
    "mask", "mask per head", "additive", "causal, more keys", "scale", "grouped, mask per head",
    "tangents: q", "tangents: k", "tangents: v", "tangents: qv", "tangents: kv",
)  # fmt: skip
INTERPRETED = {
    **{name: (CASES[name], torch.float32, 1e-6) for name in ALONE},
    "channels to pad": (Case(q=(1, 2, 37, 72), k=(1, 2, 45, 72)), torch.float32, 1e-6),
    "float16": (Case(**LARGE, mask=(130, 70)), torch.float16, 4e-4),
    "float16, additive": (Case(**LARGE, mask=(1, 70), additive=True), torch.float16, 4e-4),
    "float16, common part": (Case(**LARGE, shift=20.0), torch.float16, 4e-4),
    # The interpreter does not round to bfloat16 but truncates: twice the error of a GPU.
    "bfloat16": (Case(**LARGE), torch.bfloat16, 8e-3),
}
AMPERE, HOPPER = 80, 90
COMPILED = {
    "head 64": (HOPPER, Case(q=(1, 2, 64, 64), transposed=True), torch.bfloat16),
    "head 72": (HOPPER, Case(q=(1, 3, 64, 72), is_causal=True), torch.float16),
    "head 72, mask": (
        AMPERE, Case(q=(1, 2, 64, 72), mask=(64, 64), additive=True), torch.bfloat16
    ),
    "float32": (AMPERE, CASES["grouped, mask per head"], torch.float32),
    "sizes of one": (HOPPER, Case(q=(1, 1, 1, 1), tangents="q"), torch.bfloat16),
}  # fmt: skip
SHARED_BYTES = {AMPERE: 99 * 1024, HOPPER: 227 * 1024}  # of Ampere's smallest cards


def interpret() -> dict[str, float]:
    """Error of the kernel by case, run by Triton's interpreter (TRITON_INTERPRET=1)."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from facm_core.jvp import attention_triton

    plain_dot = InterpreterBuilder.create_dot

    def dot(self: Any, *args: Any) -> Any:
        """Its own takes the bits of bfloat16 for integers."""
        wide = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in args[:2]
        )
        return plain_dot(self, *wide, *args[2:])

    InterpreterBuilder.create_dot = dot
    attention._in_blocks = attention_triton.launch
    return {name: error(case, dtype) for name, (case, dtype, _) in INTERPRETED.items()}


def compile_only() -> dict[str, tuple[int, str]]:
    """Shared memory and assembly of the kernel by case."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from facm_core.jvp import attention_triton

    kernel, results = attention_triton._tangent, {}

    class Target:
        def __init__(self, architecture: int) -> None:
            self.get_current_target = lambda: GPUTarget("cuda", architecture, 32)
            self.get_current_device = lambda: architecture
            self.get_current_stream = lambda _: 0

    class Compiler:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return functools.partial(self.compile, grid=grid)

        def compile(self, *args: Any, **kwargs: Any) -> None:
            self.code = kernel.warmup(*args, **kwargs)

    attention_triton._tangent = compiler = Compiler()
    attention._in_blocks = attention_triton.launch
    for name, (architecture, case, dtype) in COMPILED.items():
        driver.set_active(Target(architecture))
        args, options = case.inputs(dtype)
        attention_tangent(*args, **options)
        results[name] = compiler.code.metadata.shared, compiler.code.asm["ptx"]
    return results


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """``kernel("interpret")``, ``kernel("compile_only")``: results of a process of its own."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    @functools.cache
    def run(mode: str) -> dict[str, Any]:
        settings = {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
            "TRITON_INTERPRET": str(int(mode == "interpret")),
        }
        argv = [sys.executable, __file__, mode]
        done = subprocess.run(argv, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("name", INTERPRETED)
def test_the_kernel_equals_the_formula(name: str, kernel: Any) -> None:
    assert kernel("interpret")[name] < INTERPRETED[name][-1]


@pytest.mark.parametrize("name", COMPILED)
def test_the_kernel_compiles(name: str, kernel: Any) -> None:
    shared_bytes, assembly = kernel("compile_only")[name]
    assert shared_bytes <= SHARED_BYTES[COMPILED[name][0]]
    assert "tf32" not in assembly
    if "head" in name:
        # Numbers of 16 bits are loaded eight at a time, also where 16 does not divide the head.
        assert "ld.global.b16" not in assembly


def test_the_kernel_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def serves(kernel: Any, dtype: torch.dtype, head: int, is_cuda: bool = True) -> bool:
        q = v = SimpleNamespace(shape=(1, 1, 1, head))
        return kernel.serves(q, v, SimpleNamespace(dtype=dtype, is_cuda=is_cuda))

    pytest.importorskip("triton")
    with_triton = load("facm_core.jvp.attention_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    without_triton = load("facm_core.jvp.attention_triton")
    assert serves(with_triton, torch.bfloat16, 256)
    assert not serves(without_triton, torch.bfloat16, 256)
    assert not serves(with_triton, torch.bfloat16, 257)
    assert not serves(with_triton, torch.float64, 64)
    assert not serves(with_triton, torch.bfloat16, 64, is_cuda=False)


def load(name: str) -> Any:
    """A fresh copy of a module."""
    spec: Any = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"interpret": interpret, "compile_only": compile_only}[sys.argv[1]]()))
