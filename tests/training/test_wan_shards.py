"""Wan 2.2 14B on 32 simulated ranks: what each of them holds, and the planner's word for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from facm_core.ema import PowerEMA
from facm_core.memory import MemoryConfig, MemoryPlan, plan, preset_of
from facm_core.models.experts import Experts
from facm_core.models.wan import wan_preset
from facm_platform.training.loading import parameters_on_meta
from facm_platform.training.parallel import Sharding, local

CPU = torch.device("cpu")
RANKS = 32
BUDGET_BYTES = 80e9
NETWORK = preset_of(wan_preset("wan-14b", height=90, width=160))  # latents of an image of 720p


@contextmanager
def simulated(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of this rank's storages, with what FSDP pads them by."""
    return sum(local(tensor).untyped_storage().nbytes() for tensor in tensors)


def resident(rank: int) -> dict[str, int]:
    """What lives on `rank` through a run: the training's own objects, without storage."""
    with simulated(rank):
        with parameters_on_meta():
            student = NETWORK.build()
            experts = Experts(NETWORK.build(), NETWORK.build(), boundary=0.875)
        sharding = Sharding(precision="bfloat16")
        student = sharding.apply(student, CPU)
        experts = sharding.apply(experts.requires_grad_(False), CPU)
        ema = PowerEMA(student, (0.05, 0.2))
        optimizer = torch.optim.AdamW(student.parameters())
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return {
            "parameters": nbytes(student.parameters()),
            "optimizer": nbytes(v for v in moments if isinstance(v, DTensor)),
            "averages": nbytes(v for profile in ema.profiles.values() for v in profile.values()),
            "teachers": nbytes(experts.parameters()),
            "gradients": nbytes(parameter.grad for parameter in student.parameters()),
        }


@pytest.fixture(scope="module")
def shapes() -> list[torch.Size]:
    with torch.device("meta"):
        return [parameter.shape for parameter in NETWORK.build().parameters()]


@pytest.fixture(scope="module")
def predicted() -> MemoryPlan:
    return plan(NETWORK, MemoryConfig(gpus=RANKS, dtype="bfloat16", recompute=True, teachers=2))


def chunk_bytes(shapes: list[torch.Size], rank: int) -> int:
    """Of the shard, by torch's own rule for cutting."""
    chunks = [torch.empty(shape, device="meta").chunk(RANKS) for shape in shapes]
    return 4 * sum(pieces[rank].numel() for pieces in chunks if rank < len(pieces))


def test_the_first_rank_has_most(shapes: list[torch.Size]) -> None:
    sizes = [chunk_bytes(shapes, rank) for rank in range(RANKS)]
    assert max(sizes) == sizes[0]
    assert sum(sizes) == 4 * 14_288_491_584


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 15, RANKS - 1])
def test_no_rank_is_above_its_budget(
    predicted: MemoryPlan, shapes: list[torch.Size], rank: int
) -> None:
    """The planner's figures are those of the shards, within one row of each tensor."""
    held = resident(rank)
    row_bytes = 4 * sum(shape[1:].numel() for shape in shapes)
    copies = {"parameters": 1, "optimizer": 2, "averages": 2, "teachers": 2, "gradients": 1}
    assert held.keys() == copies.keys()
    for name, count in copies.items():
        assert abs(held[name] - getattr(predicted, name)) <= count * row_bytes, name
    # Every rank has parameters of the first one's size: FSDP pads them.
    assert held["parameters"] == chunk_bytes(shapes, 0)
    assert held["gradients"] == chunk_bytes(shapes, rank)
    step = predicted.unsharded + predicted.activations
    assert sum(held.values()) + step < BUDGET_BYTES
    assert sum(held.values()) + step == pytest.approx(predicted.total, rel=0.01)
