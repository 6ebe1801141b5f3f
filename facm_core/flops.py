"""Floating-point operations of what runs, attention's tangent included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

import facm_core.jvp  # noqa: F401  (registers attention's tangent)


class FlopCounter(TorchDispatchMode):
    """PyTorch's formulas, without the module hooks of its own counter."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@register_flop_formula(torch.ops.facm_core.attention_tangent)
def _attention_tangent_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Scores, both terms of their tangent, and the two products with values."""
    *heads, n, e = q
    m, ev = v[-2:]
    return 2 * math.prod(heads) * n * m * (3 * e + 2 * ev)
