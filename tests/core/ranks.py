"""Tests on several gloo ranks of this machine: the launcher, and what the ranks' scripts share.

A script runs as ``python SCRIPT FOLDER RANK WORLD_SIZE``, reads FOLDER/cases.pt and leaves
FOLDER/RANK.pt.
"""

from __future__ import annotations

import os
import subprocess
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

from facm_core.models import LightningDiT, LightningDiTConfig

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_SECONDS = 120

Cases = dict[str, dict[str, Any]]
Results = dict[str, list[dict[str, Any]]]
"""Case -> what each rank found."""


def run_ranks(script: Path, cases: Cases, folder: Path, world_size: int = 2) -> Results:
    """Run `script` once a rank. Neither a failure nor a hang of a rank may hang the tests."""
    torch.save(cases, folder / "cases.pt")
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), str(rank), str(world_size)],
            env=environment,
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process in processes:
            process.wait(timeout=WATCHDOG_SECONDS)
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, Path(log.name).read_text()[-3000:]
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    return {name: [rank[name] for rank in ranks] for name in cases}


def be_a_rank(one_step: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A rank's script: `one_step` of every case, in the same order on all ranks."""
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    cases = torch.load(folder / "cases.pt", weights_only=True)
    torch.save({name: one_step(case) for name, case in cases.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


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


def rows_of_this_rank(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.tensor_split(dist.get_world_size())[dist.get_rank()] for k, v in batch.items()}


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().double()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().double()
