"""Distillation by FACM, MeanFlow and sCM: what each makes of a recipe, and that it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.objectives import SCM, FACMConfig, MeanFlowConfig, SCMConfig
from facm_platform.config import load_config
from facm_platform.training.config import WorkersConfig
from facm_platform.training.context import LocalContext
from facm_platform.training.distill import DistillConfig, prepare
from facm_platform.training.launch import launch
from facm_platform.training.loop import train
from facm_platform.training.task import TrainingTask
from tests.training.conftest import (
    TRAIN,
    Interrupted,
    InterruptedContext,
    plain_training,
    weights,
)

METHODS = ["mean_flow", "scm"]


def task_of(folder: Path, data_uri: str, teacher_uri: str, *options: str) -> TrainingTask:
    """Of a recipe with these options."""
    given = [
        "run.name=run",
        f"run.storage_uri={folder}",
        f"data.uri={data_uri}",
        f"teacher.uri={teacher_uri}",
        "train.images=96",
        "train.global_batch_size=8",
    ]
    task = prepare(load_config(DistillConfig, None, [*given, *options])).task("", "")
    return replace(task, train=TRAIN, run_id=None)


@pytest.fixture
def method_task(
    request: pytest.FixtureRequest, tmp_path: Path, digits_uri: str, teacher_uri: str
) -> TrainingTask:
    """Of the method that a test is parametrised with."""
    return task_of(tmp_path, digits_uri, teacher_uri, f"{request.param}={{}}")


@pytest.mark.parametrize(
    ("options", "objective", "name", "conditioning"),
    [
        ([], FACMConfig(), "facm", "expanded"),
        (["objective.conditioning=auxiliary"], None, "facm", "auxiliary"),
        (["mean_flow.p=0.5"], MeanFlowConfig(p=0.5), "mean_flow", "auxiliary"),
        (["scm.guidance.scale=2"], SCMConfig(guidance=GuidanceConfig(scale=2)), "scm", "plain"),
    ],
)
def test_a_recipe_names_the_method(
    tmp_path: Path,
    digits_uri: str,
    teacher_uri: str,
    options: list[str],
    objective: Any,
    name: str,
    conditioning: str,
) -> None:
    task = task_of(tmp_path, digits_uri, teacher_uri, *options)
    assert objective is None or task.objective == objective
    assert (task.artifact.objective, task.artifact.conditioning) == (name, conditioning)
    assert task.artifact.architecture.second_time == (conditioning == "auxiliary")
    assert task.artifact.guidance_scale == task.objective.guidance.scale


@pytest.mark.parametrize(
    "options",
    [["mean_flow={}", "scm={}"], ["scm={}", "objective.lambda_fm=2"], ["scm={}", "objective={}"]],
)
def test_two_methods_are_refused(
    tmp_path: Path, digits_uri: str, teacher_uri: str, options: list[str]
) -> None:
    with pytest.raises(InvalidInputError, match=r"scm.*each in place of the other"):
        task_of(tmp_path, digits_uri, teacher_uri, *options)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method_task", METHODS, indirect=True)
def test_the_loop_equals_plain_adamw(method_task: TrainingTask, tmp_path: Path) -> None:
    train(method_task, LocalContext(tmp_path / "run"))
    got = weights(method_task)
    for name, expected in plain_training(method_task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("method_task", ["scm"], indirect=True)
def test_what_an_objective_learns_is_resumed(method_task: TrainingTask, tmp_path: Path) -> None:
    """To the same bits; sCM's weight of the loss has then changed, and its moments too."""
    learned = []

    class Watched(TrainingTask):
        def build_objective(self) -> Any:
            learned.append(super().build_objective())
            return learned[-1]

    halves = Watched(**vars(method_task) | {"folder_uri": str(tmp_path / "halves")})
    train(method_task, LocalContext(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(halves, InterruptedContext(tmp_path / "halves", batches_left=7))
    train(halves, LocalContext(tmp_path / "halves"))
    expected, got = weights(method_task), weights(halves)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert isinstance(learned[-1], SCM)
    assert learned[-1].log_weight.weight.detach().abs().sum() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("method_task", METHODS, indirect=True)
def test_two_workers_equal_one_plain_process(method_task: TrainingTask) -> None:
    launch(method_task, WorkersConfig(max=2))
    got = weights(method_task)
    for name, expected in plain_training(method_task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)
