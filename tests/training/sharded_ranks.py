"""A rank's part of `test_sharded.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from facm_core.ema import PowerEMA
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_platform.training.parallel import Sharding, differing_replicas, whole
from tests.core.ranks import be_a_rank


def one_case(case: dict[str, Any]) -> dict[str, Any]:
    model = LightningDiT(LightningDiTConfig(**case["architecture"]))
    model.load_state_dict(case["steps"][0], strict=False)
    sharding = Sharding(replicas=case["replicas"])
    model = sharding.apply(model, torch.device("cpu"))
    return averages(model, case) if case["what"] == "ema" else replicas(model, case)


def averages(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Of a network that takes the weights of each step."""
    ema = PowerEMA(model, case["sigma_rels"])
    for number, weights in enumerate(case["steps"], start=1):
        _take(model, weights)
        ema.update(model, images_seen=8 * number, images_step=8)
    return {
        sigma_rel: {name: whole(average) for name, average in profile.items()}
        for sigma_rel, profile in ema.profiles.items()
    }


def replicas(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What is noticed when a value of rank 1 changes: in a parameter, and in a plain tensor."""
    named: dict[str, Tensor] = dict(model.named_parameters()) | {"plain": torch.zeros(3)}
    before = differing_replicas(named)
    if dist.get_rank() == 1:
        changed = named[case["name"]].detach()
        local = changed.to_local() if hasattr(changed, "to_local") else changed
        local.view(-1)[-1] += 1e-6
    return {"before": before, "after": differing_replicas(named)}


@torch.no_grad()
def _take(model: Any, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        whole = weights[name]
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))


if __name__ == "__main__":
    be_a_rank(one_case)
