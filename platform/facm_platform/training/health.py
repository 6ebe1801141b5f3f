"""Numbers that tell how a run is, beside its loss; taken at log points only."""

from __future__ import annotations

from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, optim
from torch.nn.utils import get_total_norm

from facm_platform.training.parallel import whole


def update_to_weight(optimizer: optim.Optimizer) -> float:
    """‖Δθ‖ / ‖θ‖ of AdamW's last step, from its moments. A collective; nan before the first."""
    updates, weights = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                updates.append(_update(parameter.detach(), state, group))
                weights.append(parameter.detach())
    if not weights:
        return float("nan")
    return float(whole(get_total_norm(updates)) / whole(get_total_norm(weights)))


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """What AdamW has added, up to sign (arXiv 1711.05101, algorithm 2)."""
    (beta_1, beta_2), step = group["betas"], float(state["step"])
    mean = state["exp_avg"] / (1 - beta_1**step)
    deviation = (state["exp_avg_sq"] / (1 - beta_2**step)).sqrt() + group["eps"]
    # Decay acted on the weights before the step; they differ by a share of 1e-3 or so.
    return group["lr"] * (mean / deviation + group["weight_decay"] * parameter)


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
