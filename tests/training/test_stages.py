"""Values that change on the way, and runs that begin with another run's checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.objectives import FACMConfig
from facm_core.times import TimesConfig
from facm_platform.config import as_yaml, load_config
from facm_platform.training.context import LocalContext
from facm_platform.training.distill import DistillConfig, prepare
from facm_platform.training.loop import train
from facm_platform.training.task import Stage, TrainingTask
from tests.training.conftest import Interrupted, InterruptedContext, MakeTask, weights
from tests.world import World

OTHER = FACMConfig(lambda_fm=0.1, times=TimesConfig(kind="uniform"))


def run(task: TrainingTask, folder: Path, context: Any = LocalContext, **options: Any) -> Any:
    task = replace(task, folder_uri=str(folder))
    train(task, context(folder, **options))
    return weights(task)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.usefixtures("process_group")
def test_a_stage_is_as_if_the_run_had_gone_on_with_another_recipe(
    make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task()
    rate = replace(task.train, learning_rate=5e-4)
    half = replace(task.train, images=48)
    run(replace(task, train=half), tmp_path / "by hand")
    by_hand = run(replace(task, train=rate, objective=OTHER), tmp_path / "by hand")
    staged = replace(task, stages=(Stage(48, OTHER, rate),))
    assert equal(run(staged, tmp_path / "staged"), by_hand)
    assert not equal(run(task, tmp_path / "plain"), by_hand)
    # Interrupted in the second stage, after 11 of 12 steps.
    with pytest.raises(Interrupted):
        run(staged, tmp_path / "cut", InterruptedContext, batches_left=11)
    assert equal(run(staged, tmp_path / "cut"), by_hand)


@pytest.mark.usefixtures("process_group")
def test_a_run_may_begin_with_the_checkpoint_of_another(
    make_task: MakeTask, tmp_path: Path
) -> None:
    task = make_task()
    run(task, tmp_path / "donor")
    checkpoint = str(tmp_path / "donor" / "checkpoint_000000000032")
    staged = replace(task, stages=(Stage(32, OTHER, task.train),))
    heir = replace(staged, start_uri=checkpoint)
    first = tmp_path / "heir"
    with pytest.raises(Interrupted):
        # At 64 images there is a checkpoint of its own.
        run(heir, first, InterruptedContext, batches_left=5)
    own = [path.name for path in first.glob("checkpoint_*")]
    assert own == ["checkpoint_000000000064"]
    assert equal(run(heir, first), run(staged, tmp_path / "staged"))


def options(world: World, folder: Path, stages: list[Any], *more: str) -> list[str]:
    given = [*world.options("run", folder), "train.images=96", f"stages={json.dumps(stages)}"]
    return [*given, *more]


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([{"objective.p": 1}], [], "stages.0 = {'objective.p': 1}: no mapping of from_images, abo"),
        ([3], [], "stages.0 = 3: no mapping of from_images"),
        ([{"from_images": 8}], [], "stages.0 = {'from_images': 8}: no mapping of from_images"),
        (
            [{"from_images": n, "objective.p": 1} for n in (16, 16)],
            [],
            "stages.1 = {'from_images': 16, 'objective.p': 1}: no mapping of from_images, above 16",
        ),
        (
            [{"from_images": 8, "objective.pp": 1}],
            [],
            "stages.0.objective.pp = 1: unknown key, did you mean 'objective.p'?",
        ),
        ([{"from_images": 8, "objective.p": -1}], [], "stages.0.objective.p = -1.0: not positive"),
        (
            [{"from_images": 8, "train.global_batch_size": 4}],
            [],
            "stages.0 = 'train.global_batch_size': it cannot change in mid-run",
        ),
        (
            [{"from_images": 8, "objective.conditioning": "auxiliary"}],
            [],
            "stages.0 = 'objective.conditioning': it cannot change in mid-run",
        ),
        (
            [{"from_images": 8, "objective.p": 1}],
            ["scm.warmup_images=8"],
            "stages.0 = 'objective.p': it cannot change in mid-run",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused(
    world: World, tmp_path: Path, stages: list[Any], more: list[str], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        prepare(load_config(DistillConfig, None, options(world, tmp_path, stages, *more)))


def test_stages_of_a_recipe(world: World, tmp_path: Path) -> None:
    stages = [
        {"from_images": 16, "objective.lambda_fm": 0.1, "objective.times.kind": "uniform"},
        {"from_images": 48, "train.learning_rate": 1e-5},
    ]
    config = load_config(DistillConfig, None, options(world, tmp_path, stages))
    task = prepare(config).task("", "")
    told = [
        (stage.objective.lambda_fm, stage.objective.times.kind, stage.train.learning_rate)
        for stage in map(task.stage_at, (0, 15, 16, 47, 48, 96))
        if isinstance(stage.objective, FACMConfig)
    ]
    first, second, third = (
        (1.0, "arctan_lognormal", 1e-4),
        (0.1, "uniform", 1e-4),
        (0.1, "uniform", 1e-5),
    )
    assert told == [first, first, second, second, third, third]
    file = tmp_path / "again.yaml"
    file.write_text(as_yaml(config))
    assert load_config(DistillConfig, str(file)) == config
