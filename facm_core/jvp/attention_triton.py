# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The tangent of attention as one Triton kernel, for CUDA.

The loop over blocks of keys is FlashAttention's (arXiv 2307.08691): with p = exp(S − the row's
maximum so far), it carries Σ p and the same sums that stand in

    dO = (P∘(dS − c))V − rowsum(P∘(dS − c))∘O + P dV

This holds for any number c per query. Here c is the mean of dS over the first keys that take part:
then the terms in dS hardly cancel, and neither the rounding of O, which comes from outside, nor
that of P∘(dS − c) on its way to the tensor cores is magnified.

Legend: N queries, M keys, E channels of a query or key, W of a value; leading dimensions b, h, g.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore

    jit: Callable[..., Any] = triton.jit
except ImportError:  # not every platform has it
    triton, jit = None, lambda function: function

LARGEST_HEAD = 256


def serves(q: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes this device, dtype and head size."""
    return (
        triton is not None
        and out.is_cuda
        and out.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD
    )


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    out: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    result: Tensor,
) -> None:
    """Write dO into `result`. All have the same leading dimensions, three or more, by any strides.

    Products are taken in the dtype of `out`, float32 without TF32, and summed in float32.
    """
    *outer, b, h, g, n, e = q.shape
    m, w = v.shape[-2:]
    channels = max(16, triton.next_power_of_2(max(e, w)))
    tuning = _tuning(channels, out.dtype, mask is not None)
    grid = (b * h * g * triton.cdiv(n, tuning["N_BLOCK"]),)
    operands = [x if x is None else x.to(out.dtype) for x in (q, k, v, dq, dk, dv)]
    with torch.cuda.device_of(out):
        for index in product(*map(range, outer)):
            views = [x if x is None else x[index] for x in (*operands, out, result, mask)]
            *given, masks = [() if x is None else x.stride() for x in views]
            unit = 8 if all(stride % 8 == 0 for x in given for stride in x[:-1]) else 1
            strides = [(*(stride // unit for stride in x[:-1]), *x[-1:]) for x in given]
            sizes = (h, g, n, m, e, w, channels, unit)
            _tangent[grid](*views, *strides, masks, *sizes, scale, is_causal, **tuning)


def _tuning(channels: int, dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    """Block sizes by head size: the code for Ampere and Hopper spills few registers or none.

    On Ampere it fits into the 99 KiB of shared memory of the smallest cards.
    """
    if dtype == torch.float32:  # without tensor cores, operands stay in registers
        n_block, m_block, stages = (32, 32, 1) if channels <= 64 else (16, 16, 1)
    elif channels <= 64:
        n_block, m_block, stages = 128, 64, 2
    elif channels <= 128:
        n_block, m_block, stages = 128, 32, 1 if masked else 2
    else:
        n_block, m_block, stages = 32, 32, 1
    # Fused multiply-adds: Triton is about to change its default.
    options = {"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
    return {"N_BLOCK": n_block, "M_BLOCK": m_block, **options}


@jit
def _tangent(
    q, k, v, dq, dk, dv, out, result, mask,
    q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides,
    out_strides, result_strides, mask_strides,
    h_size, g_size, n_size, m_size,
    E: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr, UNIT: tl.constexpr,
    scale, CAUSAL: tl.constexpr, N_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr,
):  # fmt: skip
    """dO of N_BLOCK queries of one head. What is None is left out of the compiled code."""
    log2_e: tl.constexpr = 1.4426950408889634  # exp(x) = exp2(x·log2 e), and exp2 is hardware
    n_blocks = tl.cdiv(n_size, N_BLOCK)
    cell = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h, g = cell // (h_size * g_size), cell // g_size % h_size, cell % g_size
    n_start = tl.program_id(0) % n_blocks * N_BLOCK
    n_left = n_size - n_start
    n, m, channel = tl.arange(0, N_BLOCK), tl.arange(0, M_BLOCK), tl.arange(0, CHANNELS)

    q_n = _load(q, q_strides, UNIT, b, h, g, n_start, n, channel, n_left, E)
    if dq is not None:
        dq_n = _load(dq, dq_strides, UNIT, b, h, g, n_start, n, channel, n_left, E)
    largest = tl.full([N_BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([N_BLOCK], tl.float32)  # Σ p
    centre = tl.zeros([N_BLOCK], tl.float32)  # c
    excess = tl.zeros([N_BLOCK], tl.float32)  # Σ p·(dS − c)
    total = tl.zeros([N_BLOCK, CHANNELS], tl.float32)  # Σ p·(dS − c)·V + p·dV

    stop = tl.minimum(m_size, n_start + N_BLOCK) if CAUSAL else m_size
    for m_start in range(0, stop, M_BLOCK):
        m_left = m_size - m_start
        k_m = _load(k, k_strides, UNIT, b, h, g, m_start, m, channel, m_left, E)
        s = tl.dot(q_n, k_m.T, input_precision="ieee") * (scale * log2_e)
        if mask is not None:
            m_mask = m + tl.cast(m_start, tl.int64)
            shown = _load(mask, mask_strides, 1, b, h, g, n_start, n, m_mask, n_left, m_size)
            if mask.dtype.element_ty == tl.int1:
                s = tl.where(shown, s, float("-inf"))
            else:
                s += shown.to(tl.float32) * log2_e
        if CAUSAL:
            s = tl.where((n_start + n)[:, None] >= (m_start + m)[None, :], s, float("-inf"))
        s = tl.where((m < m_left)[None, :], s, float("-inf"))

        larger = tl.maximum(largest, tl.max(s, 1))
        origin = tl.where(larger == float("-inf"), 0.0, larger)  # without keys: p = 0, not NaN
        p = tl.exp2(s - origin[:, None])
        p_sum = tl.sum(p, 1)
        shrink = tl.exp2(largest - origin)
        total *= shrink[:, None]
        if dq is not None or dk is not None:
            ds = tl.zeros([N_BLOCK, M_BLOCK], tl.float32)
            if dq is not None:
                ds = tl.dot(dq_n, k_m.T, ds, input_precision="ieee")
            if dk is not None:
                dk_m = _load(dk, dk_strides, UNIT, b, h, g, m_start, m, channel, m_left, E)
                ds = tl.dot(q_n, dk_m.T, ds, input_precision="ieee")
            ds *= scale
            weighted = tl.sum(p * ds, 1)
            centre = tl.where(mass == 0, weighted / tl.where(p_sum == 0, 1.0, p_sum), centre)
            excess = excess * shrink + (weighted - centre * p_sum)
            v_m = _load(v, v_strides, UNIT, b, h, g, m_start, m, channel, m_left, W)
            slope = (p * (ds - centre[:, None])).to(v_m.dtype)
            total = tl.dot(slope, v_m, total, input_precision="ieee")
        if dv is not None:
            dv_m = _load(dv, dv_strides, UNIT, b, h, g, m_start, m, channel, m_left, W)
            total = tl.dot(p.to(dv_m.dtype), dv_m, total, input_precision="ieee")
        mass = mass * shrink + p_sum
        largest = larger

    o_n = _load(out, out_strides, UNIT, b, h, g, n_start, n, channel, n_left, W).to(tl.float32)
    do = (total - excess[:, None] * o_n) / mass[:, None]
    tl.store(
        _address(result, result_strides, UNIT, b, h, g, n_start, n, channel),
        tl.where(mass[:, None] == 0, 0.0, do).to(result.dtype.element_ty),
        mask=(n < n_left)[:, None] & (channel < W)[None, :],
    )


@jit
def _load(x, strides, UNIT: tl.constexpr, b, h, g, start, rows, columns, rows_left, columns_size):
    """x[b, h, g, start + rows, columns]; zero outside."""
    return tl.load(
        _address(x, strides, UNIT, b, h, g, start, rows, columns),
        mask=(rows < rows_left)[:, None] & (columns < columns_size)[None, :],
        other=0,
    )


@jit
def _address(x, strides, UNIT: tl.constexpr, b, h, g, start, rows, columns):
    """Strides but the last count in units, so that the compiler sees what is aligned."""
    # Long ways in 64 bits, as scalars; 32 are enough within a block.
    matrix = x + (b * strides[0] + h * strides[1] + g * strides[2]) * UNIT
    block = matrix + tl.cast(start, tl.int64) * strides[3] * UNIT
    return block + rows[:, None] * strides[3] * UNIT + columns[None, :] * strides[4]
