"""How much memory a worker needs, told before the run; and what helps when it was not enough."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from facm_core.errors import InvalidInputError
from facm_core.memory import MemoryConfig, MemoryPlan, Preset, plan, preset_of
from facm_core.models import Architecture
from facm_platform.training.config import LoraConfig, TrainConfig
from facm_platform.training.loading import parameters_on_meta
from facm_platform.training.lora import add_adapters


def worker_memory(
    architecture: Architecture,
    train: TrainConfig,
    workers: int,
    *,
    teachers: int,
    lora: LoraConfig | None = None,
) -> MemoryPlan:
    """Of each of so many workers, see `facm_core.memory`; with nothing offloaded.

    Args:
        architecture: Of the student.
        train: Optimisation.
        workers: How many there are.
        teachers: Frozen networks; 0 when training from scratch.
        lora: The student's adapters.
    """
    preset = student_preset(architecture, lora)
    return plan(preset, planned(train, workers, teachers=teachers))


def student_preset(architecture: Architecture, lora: LoraConfig | None) -> Preset:
    """The student as the planner knows it."""
    preset = preset_of(architecture)
    if lora is None:
        return preset
    return replace(preset, adapt=lambda one: _add_adapters(one, lora, architecture))


def planned(train: TrainConfig, workers: int, *, teachers: int) -> MemoryConfig:
    """A worker's pass of a step, as the planner knows it."""
    share = math.ceil(train.global_batch_size / workers)
    return MemoryConfig(
        gpus=workers // train.replicas,
        batch_size=min(share, train.micro_batch_size or share),
        dtype=train.precision,
        recompute=train.recompute,
        teachers=teachers,
        teacher_gpus=None if train.shard_teacher else 1,
        averages=len(train.ema_sigma_rels),
        jvp=teachers > 0,
    )


def _add_adapters(network: nn.Module, lora: LoraConfig, architecture: Architecture) -> None:
    """To a network of fake tensors, which peft cannot move to the device where they belong."""
    with parameters_on_meta():
        add_adapters(network, lora, architecture)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))


def out_of_memory(
    error: Exception,
    architecture: Architecture,
    train: TrainConfig,
    workers: int,
    *,
    teachers: int,
    lora: LoraConfig | None = None,
) -> InvalidInputError:
    """What to tell a user whose worker ran out of memory: each knob, and what it saves."""

    def total(settings: TrainConfig, count: int) -> int:
        return worker_memory(architecture, settings, count, teachers=teachers, lora=lora).total

    needed = total(train, workers)
    share = math.ceil(train.global_batch_size / workers)
    rows = min(share, train.micro_batch_size or share)
    knobs = {}
    if not train.recompute:
        knobs["train.recompute=true"] = total(replace(train, recompute=True), workers)
    if rows > 1:
        fewer = rows // 2
        smaller = replace(train, micro_batch_size=fewer)
        knobs[f"train.micro_batch_size={fewer}"] = total(smaller, workers)
    if train.global_batch_size >= 2 * workers:
        knobs[f"workers.max={2 * workers}"] = total(train, 2 * workers)
    if train.precision == "float32":
        knobs["train.precision=bfloat16"] = total(replace(train, precision="bfloat16"), workers)
    if not train.offload:
        memory = worker_memory(architecture, train, workers, teachers=teachers, lora=lora)
        knobs["train.offload=true"] = memory.unsharded + memory.activations
    saved = {knob: needed - less for knob, less in knobs.items() if less < needed}
    advice = ", ".join(
        f"{knob} saves {size / 2**20:,.0f} MiB"
        for knob, size in sorted(saved.items(), key=lambda item: -item[1])
    )
    reason = str(error).splitlines()[0]
    return InvalidInputError(
        "train.micro_batch_size",
        train.micro_batch_size,
        f"a worker ran out of memory ({reason}); {rows} rows at once on each of {workers} workers "
        f"were expected to take {needed / 2**20:,.0f} MiB",
        f"For each worker {advice}" if advice else "Use GPUs with more memory",
    )
