"""The dtypes that networks compute in."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cast_parameters(model: M, dtype: torch.dtype) -> M:
    """`model` with parameters of `dtype`; its buffers stay, as under FSDP's mixed precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
