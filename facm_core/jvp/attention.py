"""The tangent of attention, for which PyTorch's fused kernels have no forward mode.

With P = softmax(s·QKᵀ + mask) and O = PV, along (dQ, dK, dV):

    dS = s(dQ Kᵀ + Q dKᵀ),  r = rowsum(P∘dS),  dO = (P∘dS)V − r∘O + P dV

The scores exist one block at a time, so memory is linear in tokens. Shape legend: H heads, Hk heads
of keys and values, N queries, M keys, E channels of a query or key, Ev of a value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 18  # scores in one block: two blocks of float32 stay in a core's cache

Slices = tuple[slice, ...]


def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """dO of ``out = scaled_dot_product_attention(q, k, v, …)``; no gradient is recorded.

    Args:
        q: (…, H, N, E).
        k: (…, Hk, M, E).
        v: (…, Hk, M, Ev).
        dq: Tangent of q, shaped like it. None: q is constant, and its product is saved.
        dk: Tangent of k, likewise.
        dv: Tangent of v, likewise.
        out: (…, H, N, Ev).
        mask: True where a key takes part, or summands of the scores; broadcasts to (…, H, N, M).
            A query without any key has the tangent zero.
        is_causal: Query i sees keys 0 … i. Instead of `mask`.
        scale: s; 1/√E by default.
        enable_gqa: H/Hk consecutive heads of q share a head of k and v. Otherwise all leading
            dimensions broadcast.

    Returns:
        dO, contiguous, with the shape and dtype of `out`; computed in float32 or better.

    Raises:
        ValueError: a shape that does not fit, or both `mask` and `is_causal`.
    """
    for name, primal, tangent in (("q", q, dq), ("k", k, dk), ("v", v, dv)):
        if tangent is not None and tangent.shape != primal.shape:
            raise ValueError(
                f"tangent d{name} has shape {tuple(tangent.shape)}, "
                f"but {name} has {tuple(primal.shape)}: give one tangent per value"
            )
    if mask is not None and is_causal:
        raise ValueError("is_causal = True, but a mask is given too: give one mask that does both")
    batch = -3 if enable_gqa else -2
    lead = torch.broadcast_shapes(*(x.shape[:batch] for x in (q, k, v)))
    expected = (*lead, *q.shape[batch:-1], v.shape[-1])
    if out.shape != expected:
        raise ValueError(f"out has shape {tuple(out.shape)}, but q, k and v give {expected}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with torch.no_grad():
        return _operator(q, k, v, dq, dk, dv, out, mask, is_causal, scale, enable_gqa)


# One operator, so that a compiled graph and a simulation on the meta device see a single node.
@torch.library.custom_op("facm_core::attention_tangent", mutates_args=())
def _operator(
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
    enable_gqa: bool,
) -> Tensor:
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    if (dq is None and dk is None and dv is None) or k.numel() == 0 or out.numel() == 0:
        return result.zero_()
    lead = tuple(out.shape[:-2])
    if enable_gqa:
        lead = (*lead[:-1], k.shape[-3], lead[-1] // k.shape[-3])
    lead = (1,) * (3 - len(lead)) + lead  # the kernel addresses three or more

    def aligned(x: Tensor, rows: int = -1, columns: int = -1) -> Tensor:
        """A view of x (*lead, rows, columns), with heads (Hk, H/Hk) where they share keys."""
        if enable_gqa and x.ndim > 2:
            x = x.unflatten(-3, (min(x.shape[-3], k.shape[-3]), -1))
        return x.expand(*lead, rows, columns)

    implementation = _in_blocks
    if out.is_cuda:
        import facm_core.jvp.attention_triton as kernel  # imports slowly, and serves only here

        if kernel.serves(q, v, out):
            implementation = kernel.launch
    implementation(
        aligned(q),
        aligned(k),
        aligned(v),
        None if dq is None else aligned(dq),
        None if dk is None else aligned(dk),
        None if dv is None else aligned(dv),
        aligned(out),
        None if mask is None else aligned(mask, q.shape[-2], k.shape[-2]),
        is_causal,
        scale,
        aligned(result),
    )
    return result


@_operator.register_fake
def _fake_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    out: Tensor,
    *_: Any,
) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _in_blocks(
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
    """Write dO into `result`, on any device; all leading dimensions are the same.

    A block is as many whole heads as the budget allows, or else some queries of one head.
    """
    *lead, n, e = q.shape
    m, ev = v.shape[-2:]
    heads = max(1, BLOCK_ELEMENTS // (n * m + (n + m) * (e + ev)))
    rows = n if heads > 1 else min(n, max(1, BLOCK_ELEMENTS // m))
    dtype = torch.promote_types(out.dtype, torch.float32)
    scratch = q.new_empty(2, min(heads, math.prod(lead)) * rows * m, dtype=dtype)
    for head in _pieces(lead, heads):
        keys, values, dkeys, dvalues = (_matrices(x, head, dtype) for x in (k, v, dk, dv))
        for start in range(0, n, rows):
            block = (*head, slice(start, start + rows))
            queries, dqueries = (_matrices(x, block, dtype) for x in (q, dq))
            shape = *queries.shape[:2], m
            p, ds = (buffer[: math.prod(shape)].view(shape) for buffer in scratch)
            if is_causal:
                shown = torch.ones(shape[1:], dtype=torch.bool, device=q.device).tril(start)
            else:
                shown = _matrices(mask, block)
            _probabilities(queries, keys, shown, scale, p)
            tangent = _tangent(p, ds, queries, keys, values, dqueries, dkeys, dvalues, scale)
            _matrices(result, block).copy_(tangent)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, p: Tensor) -> None:
    """P of a block, written into p (b, n, M); zero for a query without any key."""
    torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p)
    if mask is None:
        torch.softmax(p, -1, out=p)
        return
    if mask.dtype == torch.bool:
        p.masked_fill_(~mask, -math.inf)
    else:
        p.add_(mask)
    keyless = p.amax(-1, keepdim=True) == -math.inf
    torch.softmax(p, -1, out=p).masked_fill_(keyless, 0)


def _tangent(
    p: Tensor,
    ds: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    scale: float,
) -> Tensor:
    """dO of a block (b, n, Ev); ds (b, n, M) is scratch."""
    products = [] if dv is None else [(p, dv)]
    slopes = [(a, b.mT) for a, b in ((dq, k), (q, dk)) if a is not None and b is not None]
    if slopes:
        # P∘(dS − r), since (P∘dS)V − r∘O = (P∘(dS − r))V: a large mean of dS would cancel only up
        # to the rounding of O, and this is as fast.
        _sum_of_products(slopes, scale, ds).mul_(p)
        ds.addcmul_(p, ds.sum(-1, keepdim=True), value=-1)
        products.append((ds, v))
    return _sum_of_products(products, 1, q.new_empty(*p.shape[:2], v.shape[-1]))


def _sum_of_products(pairs: list[tuple[Tensor, Tensor]], scale: float, out: Tensor) -> Tensor:
    """scale · Σ ab. Not touched by autocast, like every call with ``out``."""
    for i, (a, b) in enumerate(pairs):
        torch.baddbmm(out, a, b, beta=min(i, 1), alpha=scale, out=out)
    return out


def _matrices(x: Tensor | None, piece: Slices, dtype: torch.dtype | None = None) -> Any:
    """A piece of x as one batch of matrices: a view, if strides and dtype allow it."""
    return None if x is None else x[piece].flatten(0, -3).to(dtype or x.dtype)


def _pieces(sizes: Sequence[int], limit: int) -> Iterator[Slices]:
    """Boxes of up to `limit` cells that make up a grid, each contiguous in a contiguous tensor."""
    if not sizes:
        yield ()
        return
    step = max(1, limit // math.prod(sizes[1:]))
    for start in range(0, sizes[0], step):
        for rest in _pieces(sizes[1:], limit):
            yield slice(start, start + step), *rest
