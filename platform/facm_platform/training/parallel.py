"""FSDP2: how a network is spread over the workers, and how it comes back in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from facm_core.precision import DTYPES

M = TypeVar("M", bound=Any)


def shard(model: M, device: torch.device, precision: str, reshard_after_forward: bool = True) -> M:
    """Shard `model` in place over all workers, one unit a block and one for the rest.

    Every rank must hold the same weights before. Weights, gradient reduction and the embedding of
    times stay float32. See `TrainConfig` for the settings.
    """
    model = model.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    dtype = DTYPES[precision]
    # No inputs are cast: a time rounded to bfloat16 is another time.
    block_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policies = [
        # Some networks round the features of a time; what is made of them is float32 all the same.
        (MixedPrecisionPolicy(torch.float32, output_dtype=dtype), model.time_embedders),
        (block_policy, model.shared_parts),
        (block_policy, model.blocks),
        (replace(block_policy, output_dtype=torch.float32), [model]),
    ]
    for policy, units in policies:
        for unit in units:
            fully_shard(
                unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
            )
    return model


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole CPU copies of sharded tensors; every rank must call this, with the same names."""
    return {name: whole(tensor).detach().cpu() for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    """A distributed tensor in one piece (a collective), another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean_over_workers(values: Tensor) -> Tensor:
    """Mean of `values` over the ranks, on every rank."""
    dist.all_reduce(values)
    return values / dist.get_world_size()
