"""A rank's part of `test_loading.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from facm_core.errors import InvalidInputError
from facm_core.models import adapt
from facm_core.models.adapters import DiffusersAdapter
from facm_core.models.experts import Experts
from facm_platform.training.loading import Source, load_shards, parameters_on_meta
from facm_platform.training.parallel import Sharding, local, local_rows
from tests.anonymous import Peak, anonymous_bytes, return_freed_memory
from tests.core.ranks import be_a_rank

CPU = torch.device("cpu")
EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}


def one_case(case: dict[str, Any]) -> dict[str, Any]:
    cases = {"values": values, "refused": refused, "memory": memory}
    return cases[case["what"]](case)


# --- the same as a network that was loaded whole ------------------------------------------------


def values(case: dict[str, Any]) -> dict[str, Any]:
    """Shards and buffers of both, velocities, and which rows this rank has read."""
    got, expected = loaded_in_shards(case), loaded_whole(case)
    batch = {"text_embedding": torch.ones(4, 5, 12)}
    x, t = torch.linspace(-1, 1, 4 * 4 * 4 * 4).reshape(4, 4, 4, 4), torch.tensor([0, 0.1, 0.5, 1])
    with torch.no_grad():
        velocities = [model(x, t, batch) for model in (got, expected)]
    return {
        "got": tensors(got),
        "expected": tensors(expected),
        "velocities": velocities,
        "rows": {n: rows(p) for n, p in got.named_parameters()},
        "whole_rows": {n: len(p) for n, p in got.named_parameters()},
    }


def loaded_in_shards(case: dict[str, Any]) -> Any:
    with parameters_on_meta():
        model = experts(case, lambda _: WanTransformer3DModel(**case["network"]))
    model = Sharding(replicas=case["replicas"]).apply(model, CPU)
    load_shards(model, CPU, *sources(case))
    return model


def loaded_whole(case: dict[str, Any]) -> Any:
    """By torch's own loader."""

    def make(part: str) -> Any:
        network = WanTransformer3DModel(**case["network"])
        files = sorted((folder(case) / part).glob("*.safetensors"))
        network.load_state_dict({n: t for file in files for n, t in load_file(file).items()})
        return network

    return Sharding(replicas=case["replicas"]).apply(experts(case, make), CPU)


def experts(case: dict[str, Any], make: Callable[[str], Any]) -> Experts:
    high, low = (wan(case, make(part)) for part in EXPERTS)
    model = Experts(high, low, boundary=0.875)
    model.collective = True
    return model


def wan(case: dict[str, Any], network: Any) -> DiffusersAdapter:
    return adapt(network, null={"text_embedding": torch.full((5, 12), 0.25)})


def sources(case: dict[str, Any]) -> list[Source]:
    names = {part: f"{expert}.network.{{}}".format for part, expert in EXPERTS.items()}
    return [Source(folder(case) / part, name) for part, name in names.items()]


def folder(case: dict[str, Any]) -> Path:
    return Path(case["folder"])


def tensors(model: Any) -> dict[str, Tensor]:
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: local(tensor).detach().clone() for name, tensor in everything.items()}


def rows(parameter: DTensor) -> list[int]:
    return list(range(len(parameter)))[local_rows(parameter)]


# --- what is refused ----------------------------------------------------------------------------


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """The error of folders that may differ by rank, and whether the model was left as it was."""
    with parameters_on_meta():
        model = WanTransformer3DModel(**case["network"])
    model = Sharding(replicas=1).apply(adapt(model), CPU)
    where = Path(case["folders"][dist.get_rank()])
    try:
        load_shards(model, CPU, Source(where, "network.{}".format))
    except InvalidInputError as error:
        untouched = all(parameter.is_meta for parameter in model.parameters())
        return {"error": str(error), "untouched": untouched}
    return {"error": None, "untouched": False}


# --- how much memory it takes -------------------------------------------------------------------


def memory(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of this process's own memory above what it had before there was a network."""
    return_freed_memory()
    load = loaded_whole if case["whole"] else loaded_in_shards
    load({**case, **case["warm_up"]})  # imports, pools, threads
    gc.collect()
    before = anonymous_bytes()
    with Peak() as peak:
        model = load(case)
    parameters = [local(parameter) for parameter in model.parameters()]
    return {
        "peak": peak.bytes - before,
        "shard": sum(p.untyped_storage().nbytes() for p in parameters),
        "tensor": max(4 * parameter.numel() for parameter in model.parameters()),
    }


if __name__ == "__main__":
    be_a_rank(one_case)
