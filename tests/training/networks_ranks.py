"""A rank's part of `test_networks.py`."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.models import build_network
from facm_core.objectives import FACMConfig
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.registry import artifact, load_artifact, open_artifact
from facm_platform.training.config import LoraConfig, TrainConfig
from facm_platform.training.context import LocalContext
from facm_platform.training.lora import add_adapters
from facm_platform.training.networks import networks
from facm_platform.training.parallel import Sharding, local
from facm_platform.training.task import TrainingTask
from tests.anonymous import Peak, anonymous_bytes, return_freed_memory
from tests.core.ranks import be_a_rank


def one_case(case: dict[str, Any]) -> dict[str, Any]:
    cases = {"values": values, "memory": memory, "refused": refused}
    return cases[case["what"]](case)


def values(case: dict[str, Any]) -> dict[str, Any]:
    """Shards of student and teacher, and of those that were loaded whole; files verified here."""
    with patch.object(artifact, "file_sha256", wraps=artifact.file_sha256) as verified:
        got = make(case)
    return {
        "verified": verified.call_count,
        "got": [tensors(model) for model in got],
        "expected": [tensors(model) for model in make_whole(case)],
        "trained": [[n for n, p in m.named_parameters() if p.requires_grad] for m in got],
        "training": [model.training for model in got],
    }


def memory(case: dict[str, Any]) -> dict[str, Any]:
    """Peak of this process's own memory above what it had before there was a network."""
    return_freed_memory()
    build = make_whole if case["whole"] else make
    build({**case, **case["warm_up"]})  # imports, pools, threads
    gc.collect()
    before = anonymous_bytes()
    with Peak() as peak:
        models = build(case)
    parameters = [p for model in models for p in model.parameters()]
    return {
        "peak": peak.bytes - before,
        "shards": sum(local(p).untyped_storage().nbytes() for p in parameters),
        "tensor": max(4 * p.numel() for p in parameters),
    }


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """The error of an artefact that is damaged."""
    try:
        make(case)
    except InvalidInputError as error:
        return {"error": str(error)}
    return {"error": None}


def make(case: dict[str, Any]) -> tuple[Any, Any]:
    context = LocalContext(Path(case["data"]))
    context.rank, context.world_size = dist.get_rank(), dist.get_world_size()
    task = task_of(case)
    sharding = Sharding(replicas=task.train.replicas)
    return networks(task, context, sharding)


def make_whole(case: dict[str, Any]) -> tuple[Any, Any]:
    """As plainly as it can be said: everything on every rank, then shards of it."""
    task = task_of(case)
    assert task.teacher_uri is not None
    torch.manual_seed(task.train.seed)
    student, teacher = build_network(task.artifact.architecture), load_artifact(case["uri"]).model
    start = teacher if task.student == "same" else teacher.get_submodule(task.student)
    student.load_state_dict({**student.state_dict(), **start.state_dict()})
    if task.lora is not None:
        torch.manual_seed(task.train.seed)
        add_adapters(student, task.lora, task.artifact.architecture)
    replicas = task.train.replicas if task.train.shard_teacher else dist.get_world_size()
    device = torch.device("cpu")
    teacher = Sharding(replicas=replicas).apply(teacher, device)
    return Sharding(replicas=task.train.replicas).apply(student, device), teacher


def task_of(case: dict[str, Any]) -> TrainingTask:
    with open_artifact(case["uri"], verify=False) as (_, info):
        config = info.config
    settings: Any = {"boundary": None} if case["student"] != "same" else {}
    settings |= {"second_time": True} if case["auxiliary"] else {}
    conditioning = "auxiliary" if case["auxiliary"] else config.conditioning
    architecture = replace(config.architecture, **settings)
    return TrainingTask(
        job="distill",
        folder_uri=case["data"],
        stream=LatentStream(case["data"], LatentManifest.load(case["data"]), 0),
        objective=FACMConfig(),
        train=TrainConfig(images=8, seed=3, **case["train"]),
        teacher_uri=case["uri"],
        student=case["student"],
        lora=LoraConfig(**case["lora"]) if case["lora"] else None,
        artifact=replace(config, architecture=architecture, conditioning=conditioning),
        tracking_uri="",
        run_id=None,
    )


def tensors(model: Any) -> dict[str, Tensor]:
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: local(tensor).detach().clone() for name, tensor in everything.items()}


if __name__ == "__main__":
    be_a_rank(one_case)
