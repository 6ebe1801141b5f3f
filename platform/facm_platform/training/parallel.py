"""FSDP2: how a network is spread over the workers, and how it comes back in one piece."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from facm_core.errors import InvalidInputError
from facm_core.models.experts import Experts
from facm_core.precision import DTYPES

_EVERYWHERE = -1
Group = dist.ProcessGroup | None
M = TypeVar("M", bound=Any)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a network lies on the workers.

    Attributes:
        precision: Of computation: ``float32`` or ``bfloat16``. Weights, gradient reduction and the
            embedding of times are float32.
        replicas: Groups of workers that hold the whole network each (HSDP).
        reshard_after_forward: Whether a block is gathered anew for each pass.
        offload: Whether shards live in the machine's memory, and not in the GPU's.
        compile: Whether the blocks are compiled.
    """

    precision: str = "float32"
    replicas: int = 1
    reshard_after_forward: bool = True
    offload: bool = False
    compile: bool = False

    def apply(self, model: M, device: torch.device) -> M:
        """Shard `model` in place, one unit a block and one for the rest, and give it back.

        Every rank must hold the same weights before; or none, on the meta device, where they stay.
        """
        if self.compile:
            for block in model.blocks:
                block.compile()
        if isinstance(model, Experts):
            model.collective = True
        mesh, offload = self._mesh(device), self._offload(device)
        if not any(parameter.is_meta for parameter in model.parameters()):
            model = model.to(self.home(device))
        dtype = DTYPES[self.precision]
        # No inputs are cast: a time rounded to bfloat16 is another time.
        block_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        policies = [
            # Some networks round the features of a time; what is made of them is float32 still.
            (MixedPrecisionPolicy(torch.float32, output_dtype=dtype), model.time_embedders),
            (block_policy, model.shared_parts),
            (block_policy, model.blocks),
            (replace(block_policy, output_dtype=torch.float32), [model]),
        ]
        for policy, units in policies:
            for unit in units:
                fully_shard(
                    unit,
                    mesh=mesh,
                    mp_policy=policy,
                    offload_policy=offload,
                    reshard_after_forward=self.reshard_after_forward,
                )
        return model

    def apply_to_parts(self, module: nn.Module, device: torch.device) -> None:
        """Shard each part of `module`, small and called on its own, in place; in float32."""
        mesh, offload = self._mesh(device), self._offload(device)
        for part in module.children():
            part.to(self.home(device))
            fully_shard(part, mesh=mesh, offload_policy=offload)

    def home(self, device: torch.device) -> torch.device:
        """Where the shards live."""
        return torch.device("cpu") if self.offload else device

    def _offload(self, device: torch.device) -> OffloadPolicy:
        pinned = device.type == "cuda"
        return CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy()

    def _mesh(self, device: torch.device) -> DeviceMesh:
        workers = dist.get_world_size()
        if self.replicas == 1:
            return init_device_mesh(device.type, (workers,))
        shape = (self.replicas, workers // self.replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replica", "shard"))


def differing_replicas(tensors: Mapping[str, Tensor], group: Group = None) -> list[int]:
    """Ranks that hold something else than the lowest rank which should hold the same.

    By hashes, on every rank: of what is not distributed, and of the same shards of what is. Shards
    that no other rank holds are left out.
    """
    hashes: defaultdict[int, Any] = defaultdict(hashlib.sha256)
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, DTensor) and tensor.device_mesh.ndim == 1:
            continue
        digest = hashes[_place(tensor)]
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    mine = {place: digest.hexdigest() for place, digest in hashes.items()}
    everyone: list[dict[int, str]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, mine, group)
    first: dict[int, str] = {}
    for of_rank in everyone:
        first = of_rank | first
    return [
        rank
        for rank, of_rank in enumerate(everyone)
        if any(first[place] != found for place, found in of_rank.items())
    ]


def _place(tensor: Tensor) -> int:
    """Which shard it is; the last dimension of a mesh shards, one before it replicates."""
    if isinstance(tensor, DTensor):
        return (tensor.device_mesh.get_coordinate() or [0])[-1]
    return _EVERYWHERE


def _bytes(tensor: Tensor) -> bytes:
    return local(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def whole(tensor: Tensor) -> Tensor:
    """A distributed tensor in one piece (a collective), another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor, another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: DTensor) -> slice:
    """Of the rows (first dimension) of the whole, those of this rank's shard.

    FSDP2 cuts as `torch.chunk` does: equal pieces, the last ones shorter or empty. The shards of
    one replica, together, are every row once.
    """
    rows, shards = tensor.shape[0], tensor.device_mesh.size(-1)
    start = min(_place(tensor) * math.ceil(rows / shards), rows)
    return slice(start, start + len(local(tensor)))


def agreed(check: Callable[[], T], group: Group = None) -> T:
    """The result of `check`, or on every rank the first error that it was on any. A collective."""
    result, error = None, None
    try:
        result = check()
    except InvalidInputError as found:
        error = found
    errors: list[InvalidInputError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group)
    for one in errors:
        if one is not None:
            raise one
    return cast(T, result)


def mean_over_workers(values: Tensor) -> Tensor:
    """Mean of `values` over the ranks, on every rank."""
    dist.all_reduce(values)
    return values / dist.get_world_size()
