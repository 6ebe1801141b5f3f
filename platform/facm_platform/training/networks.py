"""The networks of a run, sharded; what comes from an artefact is read shard by shard."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.distributed as dist

from facm_core.models import Network, build_network
from facm_platform.latents.null_text import NullText
from facm_platform.registry import open_artifact
from facm_platform.training.context import WorkerContext
from facm_platform.training.loading import (
    Source,
    initial_values,
    load_shards,
    parameters_on_meta,
)
from facm_platform.training.lora import add_adapters_on_meta, base_names
from facm_platform.training.parallel import Sharding, agreed
from facm_platform.training.task import SAME, TrainingTask


def networks(
    task: TrainingTask, context: WorkerContext, sharding: Sharding
) -> tuple[Network, Network | None]:
    """Student and teacher. A collective.

    A teacher has the null prompt of its latent set. A distilled student starts with the teacher's
    weights, or with those of one of its experts, and with adapters on them where the task has some.
    Of the artefact's file each rank reads its shards; one rank of each machine verifies it.

    Raises:
        InvalidInputError: the same on every rank; see `open_artifact`.
    """
    settings, device = task.train, context.device
    architecture = task.artifact.architecture
    if task.teacher_uri is None:
        torch.manual_seed(settings.seed)
        student = build_network(architecture)
        if architecture.text_shape:
            NullText.load(task.stream.uri, task.stream.manifest).put_into(student)
        return sharding.apply(student, device), None
    verify = _first_of_machine()
    with ExitStack() as stack:
        artifact = open_artifact(task.teacher_uri, verify=verify)
        folder, info = agreed(lambda: stack.enter_context(artifact))
        with parameters_on_meta():
            teacher = build_network(info.config.architecture).eval().requires_grad_(False)
            student = build_network(architecture)
        start = teacher if task.student == SAME else teacher.get_submodule(task.student)
        # Adapters, or a second time embedding, which the teacher has not, add nothing at first.
        torch.manual_seed(settings.seed)
        if task.lora is not None:
            others = add_adapters_on_meta(student, task.lora, architecture)
        else:
            lacking = student.state_dict().keys() - start.state_dict().keys()
            others = initial_values(lambda: build_network(architecture), lacking)
        names = base_names(student)
        replicas = settings.replicas if settings.shard_teacher else context.world_size
        teacher = replace(sharding, replicas=replicas).apply(teacher, device)
        student, home = sharding.apply(student, device), sharding.home(device)
        load_shards(teacher, home, Source(folder))
        prefix = "" if task.student == SAME else f"{task.student}."
        load_shards(student, home, Source(folder, _renaming(prefix, names)), others=others)
    return student, teacher


def _renaming(prefix: str, names: Mapping[str, str]) -> Callable[[str], str | None]:
    """Names as in `names`, where there is one, without the prefix; None for those without it."""

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        name = name.removeprefix(prefix)
        return names.get(name, name)

    return rename


def _first_of_machine() -> bool:
    """Whether this rank is the lowest of its machine. A collective."""
    mine = (socket.gethostname(), uuid.getnode())
    machines = [mine] * dist.get_world_size()
    dist.all_gather_object(machines, mine)
    return machines.index(mine) == dist.get_rank()
