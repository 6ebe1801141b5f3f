"""The loop on a real cluster: two Ray Train workers, FSDP2 over gloo, Ray Data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray.train.v2.api.exceptions import WorkerGroupError
from safetensors.torch import load_file

from facm_core.errors import InvalidInputError
from facm_core.objectives import FACM, FACMConfig
from facm_platform.latents import local_batches
from facm_platform.training.config import WorkersConfig
from facm_platform.training.launch import launch
from facm_platform.training.loop import step_seed
from facm_platform.training.task import TrainingTask
from tests.training.conftest import TRAIN, MakeTask, plain_training, weights


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sharded"),
        pytest.param(
            {"reshard_after_forward": False, "shard_teacher": False},
            id="gathered",
            marks=pytest.mark.slow,
        ),
        pytest.param({"replicas": 2, "fused": True}, id="replicated", marks=pytest.mark.slow),
    ],
)
def test_two_sharded_workers_equal_one_plain_process(
    make_task: MakeTask, options: dict[str, Any]
) -> None:
    task = make_task(train=replace(TRAIN, **options))
    metrics = launch(task, WorkersConfig(max=2))
    assert metrics["skipped_steps"] == 0
    got = weights(task)
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_do_not_fit_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(InvalidInputError, match=r"workers = 8.*4.0 CPUs"):
        launch(make_task(), WorkersConfig(max=8, cpus=1))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_with_another_number_of_workers(make_task: MakeTask) -> None:
    """And with numbers that do not divide a batch, in passes that are not equally full."""
    launch(make_task(train=replace(TRAIN, images=TRAIN.images // 2)), WorkersConfig(max=3))
    task = make_task(train=replace(TRAIN, micro_batch_size=3))
    launch(task, WorkersConfig(max=1))
    got = weights(task)
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


class Poisoned(FACM):
    """NaN in the data of rank 1, or no memory, from its step `first` on, `steps` times."""

    def __init__(self, config: FACMConfig, first: int, steps: int, memory: bool) -> None:
        super().__init__(config)
        self.first, self.steps, self.memory = first, steps, memory

    def __call__(self, student: Any, x_1: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        step = kwargs["images_seen"] // TRAIN.global_batch_size
        if dist.get_rank() == 1 and self.first <= step < self.first + self.steps:
            if self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory")
            x_1 = x_1 * float("nan")
        return super().__call__(student, x_1, *args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class PoisonedTask(TrainingTask):
    """A task whose data is bad on one rank."""

    first: int
    steps: int
    memory: bool = False

    def build_objective(self) -> Poisoned:
        assert isinstance(self.objective, FACMConfig)
        return Poisoned(self.objective, self.first, self.steps, self.memory)


@pytest.fixture
def poisoned_task(make_task: MakeTask) -> Iterator[MakeTask]:
    """``poisoned_task(first=…, steps=…)`` -> a task for two workers."""

    def make(**options: Any) -> PoisonedTask:
        return PoisonedTask(**vars(make_task()), **options)

    # Workers cannot import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield make
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.usefixtures("ray_cluster")
def test_nan_on_one_rank_skips_the_step_on_all(poisoned_task: MakeTask) -> None:
    task = poisoned_task(first=5, steps=1)
    metrics = launch(task, WorkersConfig(max=2))
    assert metrics["skipped_steps"] == 1
    assert all(torch.isfinite(value).all() for value in weights(task).values())

    folder = Path(task.skipped_uri) / "images-000000000048"
    kept = [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]
    (batch,) = local_batches(task.stream, 40, 48, 8)
    draws = FACM(FACMConfig()).draw(
        batch.latents.shape, torch.Generator().manual_seed(step_seed(TRAIN.seed, 40))
    )
    for rank, tensors in enumerate(kept):
        assert torch.equal(tensors["latents"], batch.latents[rank::2])
        assert torch.equal(tensors["label"], batch.condition[rank::2])
        assert torch.equal(tensors["draws.t"], draws.t[rank::2])
        assert torch.equal(tensors["draws.x_0"], draws.x_0[rank::2])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_no_second_try_would_mend_is_not_tried_again(poisoned_task: MakeTask) -> None:
    task = poisoned_task(first=1, steps=10**6)
    with pytest.raises(
        FloatingPointError, match=r"10 steps in a row.*up to 88 images.*run/skipped"
    ):
        launch(task, WorkersConfig(max=2))
    kept = {file.parent.name for file in Path(task.skipped_uri).rglob("*.safetensors")}
    assert kept == {f"images-{8 * step:012d}" for step in range(2, 12)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_without_memory_says_what_helps(poisoned_task: MakeTask) -> None:
    task = poisoned_task(first=1, steps=10**6, memory=True)
    with pytest.raises(WorkerGroupError) as caught:
        launch(task, WorkersConfig(max=2, max_failures=0))
    (told,) = (e for e in caught.value.worker_failures.values() if "ran out of memory" in str(e))
    assert "train.recompute=true saves" in str(told)
