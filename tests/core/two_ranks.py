"""One rank of `test_chain_jvp_fsdp`: each case is one FACM step on this rank's half of the batch.

Of a sharded network and, as the negative control, of a network that nobody reduces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from facm_core.ema import PowerEMA
from facm_core.guidance import GuidanceConfig
from facm_core.models import LightningDiT
from facm_core.objectives import FACM, FACMConfig
from facm_platform.training.parallel import shard
from tests.core.ranks import (
    be_a_rank,
    build,
    mean_over_ranks,
    rows_of_this_rank,
    shard_float64,
    whole,
)


def shard_like_the_platform(model: LightningDiT) -> LightningDiT:
    return shard(model.float(), torch.device("cpu"), "float32")


SPREADS = {
    "float64": shard_float64,
    "platform": shard_like_the_platform,
    "unreduced": lambda model: model,
}


def one_step(case: dict[str, Any]) -> dict[str, Any]:
    spread = SPREADS[case["spread"]]
    student = spread(build(case["student"], **case["architecture"]))
    teacher = build(case["teacher"], **case["architecture"] | {"second_time": False})
    if teacher is not None:
        teacher = spread(teacher)
    ema = PowerEMA(student, [0.2])
    dtype = next(student.parameters()).dtype
    mine = rows_of_this_rank(case["batch"])
    mine |= {k: v.to(dtype) for k, v in mine.items() if v.is_floating_point()}

    config = FACMConfig(
        conditioning=case["conditioning"], guidance=GuidanceConfig(scale=1.75, low=0.125)
    )
    objective = FACM(config, recompute=case["recompute"])
    output = objective(student, mine.pop("x_1"), mine.pop("condition"), teacher, **mine)
    output.loss.backward()

    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    gradients = {n: whole(p.grad) for n, p in trained.items()}
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad
    with CommDebugMode() as communication:
        ema.update(student, images_seen=18, images_step=6)
    return {
        "loss": mean_over_ranks(output.loss),
        "gradients": gradients,
        "ema": {n: whole(average) for n, average in ema.profiles["0.2"].items()},
        "ema_collectives": communication.get_total_counts(),
        "is_sharded": all(isinstance(p, DTensor) for p in trained.values()),
    }


if __name__ == "__main__":
    be_a_rank(one_step)
