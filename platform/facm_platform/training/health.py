"""Numbers that tell how a run is, beside its loss; taken at log points only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from facm_core.models.base import VelocityModel
from facm_core.objectives import FACM
from facm_platform.latents import LatentStream, local_batches
from facm_platform.training.parallel import local, mean_over_workers


def update_to_weight(optimizer: optim.Optimizer) -> float:
    """‖Δθ‖ / ‖θ‖ of AdamW's last step, from its moments. A collective; nan before the first."""
    squares = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                # Shards: each operation on a distributed tensor costs its dispatch.
                weight = local(parameter.detach())
                update = _update(weight, state, group)
                squares.append(torch.stack([_square(update), _square(weight)]))
    if not squares:
        return float("nan")
    update_square, weight_square = mean_over_workers(torch.stack(squares).sum(0)).tolist()
    return math.sqrt(update_square / weight_square)


def _update(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """What AdamW has added to a shard, up to sign (arXiv 1711.05101, algorithm 2)."""
    (beta_1, beta_2), step = group["betas"], float(state["step"])
    mean = local(state["exp_avg"]) / (1 - beta_1**step)
    deviation = (local(state["exp_avg_sq"]) / (1 - beta_2**step)).sqrt() + group["eps"]
    # Decay acted on the weights before the step; they differ by a share of 1e-3 or so.
    return group["lr"] * (mean / deviation + group["weight_decay"] * weight)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64)


def gradient_cosine(
    student: nn.Module, gradients: Callable[[FACM], object], objective: FACM
) -> float | None:
    """Between the gradients of FACM's two tasks. A collective; None if one has none.

    Args:
        student: Network under training; it is left without gradients.
        gradients: Leaves the gradients of an objective, for some batch, in the student.
        objective: Whose tasks they are.
    """
    found = []
    for task in objective.tasks():
        gradients(task)
        shards = [local(p.grad) for p in student.parameters() if p.grad is not None]
        found.append([shard.detach().clone() for shard in shards])
        student.zero_grad()
    fm, cm = found
    sums = [
        torch.stack(
            [(a * b).sum(dtype=torch.float64) for a, b in zip(one, other, strict=True)]
        ).sum()
        for one, other in ((fm, cm), (fm, fm), (cm, cm))
    ]
    product, square_fm, square_cm = mean_over_workers(torch.stack(sums)).tolist()
    size = math.sqrt(square_fm * square_cm)
    return product / size if size else None


class AnchorDrift:
    """How far the student's velocity at the anchor is from its target, on rows that stay the same.

    Args:
        objective: Whose anchor it is.
        stream: Its first rows are taken.
        rows: How many, over all workers.
        rank: Of this worker.
        world_size: How many there are.
        device: Of the networks.
    """

    def __init__(
        self,
        objective: FACM,
        stream: LatentStream,
        rows: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self._objective = objective
        (batch,) = local_batches(stream, 0, rows, rows)
        generator = torch.Generator().manual_seed(stream.seed)
        draws = objective.draw(tuple(batch.latents.shape), generator)
        mine = slice(rank, None, world_size)
        self._batch, self._draws = batch[mine].to(device), draws[mine].to(device)

    def measure(self, student: VelocityModel, teacher: VelocityModel | None) -> float:
        """‖F − v‖ / ‖v‖ over all rows. A collective."""
        batch = self._batch
        sums = self._objective.anchor_error(
            student, batch.latents, batch.condition, teacher, self._draws
        )
        error, size = mean_over_workers(torch.stack(sums).double()).tolist()
        return math.sqrt(error / size)


def peak_memory(device: torch.device) -> float:
    """Bytes, of the rank with most, since the last call: of the GPU, or of the process now."""
    if device.type == "cuda":
        mine = float(torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
    else:
        mine = float(psutil.Process().memory_info().rss)
    most = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()
