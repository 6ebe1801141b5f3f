"""One rank of `test_objectives_fsdp`: each case is one step of MeanFlow or sCM on its rows."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from facm_core.guidance import GuidanceConfig
from facm_core.objectives import SCM, MeanFlow, MeanFlowConfig, SCMConfig
from tests.core.ranks import (
    be_a_rank,
    build,
    mean_over_ranks,
    rows_of_this_rank,
    shard_float64,
    whole,
)


def build_objective(case: dict[str, Any]) -> MeanFlow | SCM:
    guidance = GuidanceConfig(scale=case["w"], low=0.125)
    if case["objective"] == "mean_flow":
        return MeanFlow(MeanFlowConfig(guidance=guidance), recompute=case["recompute"])
    objective = SCM(SCMConfig(guidance=guidance, warmup_images=4), recompute=case["recompute"])
    objective.double().load_state_dict(case["own"])
    return objective


def one_step(case: dict[str, Any]) -> dict[str, Any]:
    student = build(case["student"], **case["architecture"])
    teacher = build(case["teacher"], **case["architecture"] | {"second_time": False})
    objective = build_objective(case)
    if case["is_sharded"]:
        student, teacher = shard_float64(student), teacher and shard_float64(teacher)
        if isinstance(objective, nn.Module):
            fully_shard(objective.get_submodule(case["sharded_part"]))

    mine = rows_of_this_rank(case["batch"])
    x_1, condition = mine.pop("x_1"), mine.pop("condition")
    output = objective(student, x_1, condition, teacher, **mine, images_seen=3)
    output.loss.backward()

    modules = [student, objective] if isinstance(objective, nn.Module) else [student]
    trained = {n: p for m in modules for n, p in m.named_parameters() if p.requires_grad}
    return {
        "loss": mean_over_ranks(output.loss),
        "gradients": {n: whole(p.grad) for n, p in trained.items()},
        "is_sharded": all(isinstance(p, DTensor) for p in trained.values()),
    }


if __name__ == "__main__":
    be_a_rank(one_step)
