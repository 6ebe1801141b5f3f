"""What a user is told whose workers ran out of memory."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from facm_core.models import LightningDiTConfig
from facm_platform.training.config import TrainConfig
from facm_platform.training.memory import out_of_memory, worker_memory

NETWORK = LightningDiTConfig(
    input_size=8, in_channels=4, patch_size=1, hidden_size=64, depth=4, num_heads=4, num_classes=10
)
TRAIN = TrainConfig(images=64, global_batch_size=32)


def total(train: TrainConfig, workers: int) -> float:
    return worker_memory(NETWORK, train, workers, teachers=1).total / 2**20


def test_every_knob_and_what_it_saves() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")
    told = str(out_of_memory(error, NETWORK, TRAIN, 2, teachers=1))
    assert "CUDA out of memory. Tried to allocate 1 GiB)" in told
    assert "16 rows at once on each of 2 workers" in told
    assert f"expected to take {total(TRAIN, 2):,.0f} MiB" in told
    saved = dict(re.findall(r"([\w.]+=\w+) saves ([\d,]+) MiB", told))
    memory = worker_memory(NETWORK, TRAIN, 2, teachers=1)
    expected = {
        "train.recompute=true": total(replace(TRAIN, recompute=True), 2),
        "train.micro_batch_size=8": total(replace(TRAIN, micro_batch_size=8), 2),
        "workers.max=4": total(TRAIN, 4),
        "train.precision=bfloat16": total(replace(TRAIN, precision="bfloat16"), 2),
        "train.offload=true": (memory.unsharded + memory.activations) / 2**20,
    }
    assert saved == {k: f"{total(TRAIN, 2) - less:,.0f}" for k, less in expected.items()}
    # The one that saves most comes first.
    numbers = [int(number.replace(",", "")) for number in saved.values()]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[-1] > 0


def test_a_knob_that_is_turned_already_is_not_named() -> None:
    turned = replace(TRAIN, recompute=True, precision="bfloat16", micro_batch_size=1, offload=True)
    told = str(out_of_memory(torch.OutOfMemoryError("full"), NETWORK, turned, 32, teachers=1))
    assert told.endswith("Use GPUs with more memory.")


@pytest.mark.parametrize(("workers", "replicas"), [(4, 2), (8, 4)])
def test_replicas_are_sharded_less(workers: int, replicas: int) -> None:
    sharded = worker_memory(NETWORK, TRAIN, workers, teachers=1)
    replicated = worker_memory(NETWORK, replace(TRAIN, replicas=replicas), workers, teachers=1)
    assert replicated.parameters == pytest.approx(replicas * sharded.parameters, rel=0.01)
