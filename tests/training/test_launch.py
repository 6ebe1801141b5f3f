"""The loop on a real cluster: two Ray Train workers, FSDP2 over gloo, Ray Data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.training.config import WorkersConfig
from facm_platform.training.launch import launch
from tests.training.conftest import TRAIN, MakeTask, plain_distillation, weights


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_two_sharded_workers_equal_one_plain_process(
    make_task: MakeTask, reshard_after_forward: bool
) -> None:
    settings = replace(TRAIN, reshard_after_forward=reshard_after_forward)
    task = make_task(train=settings)
    metrics = launch(task, WorkersConfig(count=2))
    assert metrics["skipped_steps"] == 0
    got = weights(task)
    for name, expected in plain_distillation(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_do_not_fit_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(InvalidInputError, match=r"workers.count = 8.*4.0 CPUs"):
        launch(make_task(), WorkersConfig(count=8, cpus=1))


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_goes_on_with_another_number_of_workers(make_task: MakeTask) -> None:
    launch(make_task(train=replace(TRAIN, images=TRAIN.images // 2)), WorkersConfig(count=2))
    task = make_task()
    launch(task, WorkersConfig(count=1))
    got = weights(task)
    for name, expected in plain_distillation(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)
