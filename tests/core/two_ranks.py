"""One rank of `test_chain_jvp_fsdp`: ``python two_ranks.py RANK FOLDER``.

Reads FOLDER/cases.pt, leaves FOLDER/RANK.pt. Each case is one FACM step on this rank's half of the
batch, of a sharded network and, as the negative control, of a network that nobody reduces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from facm_core.ema import PowerEMA
from facm_core.guidance import GuidanceConfig
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_core.objectives import FACM, FACMConfig
from facm_platform.training.parallel import shard

WORLD_SIZE = 2


def build(weights: dict[str, Tensor] | None, **settings: Any) -> LightningDiT | None:
    if weights is None:
        return None
    model = LightningDiT(LightningDiTConfig(**settings)).double()
    model.load_state_dict(weights)
    return model


def shard_float64(model: LightningDiT) -> LightningDiT:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def shard_like_the_platform(model: LightningDiT) -> LightningDiT:
    return shard(model.float(), torch.device("cpu"), "float32")


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().double()


def one_step(case: dict[str, Any], rank: int, spread: Callable[..., Any]) -> dict[str, Any]:
    student = spread(build(case["student"], **case["architecture"]))
    teacher = build(case["teacher"], **case["architecture"] | {"second_time": False})
    if teacher is not None:
        teacher = spread(teacher)
    ema = PowerEMA(student, [0.2])
    dtype = next(student.parameters()).dtype
    mine = {k: v.tensor_split(WORLD_SIZE)[rank] for k, v in case["batch"].items()}
    mine |= {k: v.to(dtype) for k, v in mine.items() if v.is_floating_point()}

    config = FACMConfig(
        conditioning=case["conditioning"], guidance=GuidanceConfig(scale=1.75, low=0.125)
    )
    objective = FACM(config, recompute=case["recompute"])
    output = objective(student, mine.pop("x_1"), mine.pop("condition"), teacher, **mine)
    output.loss.backward()

    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    gradients = {n: whole(p.grad) for n, p in trained.items()}
    loss = output.loss.detach().double()
    dist.all_reduce(loss)
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad
    with CommDebugMode() as communication:
        ema.update(student, images_seen=18, images_step=6)
    return {
        "loss": loss / WORLD_SIZE,
        "gradients": gradients,
        "ema": {n: whole(average) for n, average in ema.profiles["0.2"].items()},
        "ema_collectives": communication.get_total_counts(),
        "is_sharded": all(isinstance(p, DTensor) for p in trained.values()),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    cases = torch.load(folder / "cases.pt", weights_only=True)
    spreads = {
        "float64": shard_float64,
        "platform": shard_like_the_platform,
        "unreduced": lambda model: model,
    }
    results = {name: one_step(case, rank, spreads[case["spread"]]) for name, case in cases.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
