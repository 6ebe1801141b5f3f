"""The loop without a cluster: exact resume, skipped steps, what it leaves behind."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from facm_core.errors import InvalidInputError
from facm_core.objectives import FACMConfig
from facm_platform.latents import Batch, LatentStream
from facm_platform.registry import load_artifact
from facm_platform.training.config import TrainConfig
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.loop import train
from tests.training.conftest import TRAIN, MakeTask, plain_distillation, weights


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """One rank."""
    with single_process_group():
        yield


class Interrupted(Exception):
    """Stands for a killed process."""


class InterruptedContext(LocalContext):
    """Dies when asked for the batch after `batches_left`; `poison` makes one batch NaN."""

    def __init__(self, folder: Path, batches_left: int = 10**9, poison: int = -1) -> None:
        super().__init__(folder)
        self.batches_left, self.poison = batches_left, poison

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        for index, batch in enumerate(super().batches(stream, start_row, stop_row, batch_rows)):
            if index == self.batches_left:
                raise Interrupted
            bad = index == self.poison or self.poison == -2
            yield replace(batch, latents=batch.latents * float("nan")) if bad else batch


@pytest.mark.parametrize("teacher", [True, False])
def test_resumed_run_ends_with_the_same_bits(
    make_task: MakeTask, tmp_path: Path, teacher: bool
) -> None:
    whole = make_task(teacher=teacher, folder_uri=str(tmp_path / "whole"))
    train(whole, LocalContext(tmp_path / "whole"))
    halves = make_task(teacher=teacher, folder_uri=str(tmp_path / "halves"))
    with pytest.raises(Interrupted):
        # After 7 of 12 steps; the checkpoint is at 4 of them.
        train(halves, InterruptedContext(tmp_path / "halves", batches_left=7))
    assert [path.name for path in (tmp_path / "halves").iterdir()] == ["checkpoint_000001"]
    train(halves, LocalContext(tmp_path / "halves"))
    expected, got = weights(whole), weights(halves)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_every_run_of_a_seed_draws_the_same_and_another_seed_does_not(
    make_task: MakeTask, tmp_path: Path
) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        task = make_task(folder_uri=str(tmp_path / name))
        task = replace(task, train=replace(task.train, seed=seed))
        train(task, LocalContext(tmp_path / name))
        runs.append(weights(task)["blocks.0.attn.qkv.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_loop_equals_plain_adamw(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    train(task, LocalContext(tmp_path / "run"))
    got = weights(task)
    for name, expected in plain_distillation(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_task: MakeTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task()
    metrics = train(task, InterruptedContext(tmp_path / "run", poison=5))
    assert metrics["skipped_steps"] == 1
    assert "step skipped" in capsys.readouterr().out
    assert all(torch.isfinite(value).all() for value in weights(task).values())


def test_too_many_of_them_end_the_run(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    with pytest.raises(FloatingPointError, match=r"10 steps in a row.*learning_rate"):
        train(task, InterruptedContext(tmp_path / "run", poison=-2))


def test_artifact_is_the_average_that_was_asked_for(make_task: MakeTask, tmp_path: Path) -> None:
    exported = {}
    for sigma_rel in (0.05, 0.2):
        task = make_task(folder_uri=str(tmp_path / str(sigma_rel)))
        task = replace(task, train=replace(task.train, export_sigma_rel=sigma_rel))
        train(task, LocalContext(tmp_path / str(sigma_rel)))
        exported[sigma_rel] = weights(task)["blocks.0.attn.qkv.weight"]
    assert not torch.equal(exported[0.05], exported[0.2])


def test_auxiliary_student_starts_as_the_teacher(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(objective=FACMConfig(conditioning="auxiliary"))
    architecture = replace(task.artifact.architecture, second_time=True)
    artifact = replace(task.artifact, architecture=architecture, conditioning="auxiliary")
    task = replace(
        task, artifact=artifact, train=replace(task.train, images=8, warmup_images=10**9)
    )
    train(task, LocalContext(tmp_path / "run"))
    assert task.teacher_uri is not None
    teacher, student = load_artifact(task.teacher_uri).model, load_artifact(task.artifact_uri).model
    x, t, label = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 10])
    torch.testing.assert_close(student(x, t, label, t), teacher(x, t, label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_precision_and_recomputation(
    make_task: MakeTask, tmp_path: Path, precision: str, recompute: bool
) -> None:
    """One step in each mode against float32 with activations kept and shards gathered anew."""
    losses = {}
    other = {"precision": precision, "recompute": recompute, "reshard_after_forward": not recompute}
    for name, settings in {"plain": {}, "other": other}.items():
        task = make_task(folder_uri=str(tmp_path / name))
        task = replace(task, train=replace(task.train, images=8, **settings))
        losses[name] = train(task, LocalContext(tmp_path / name))["loss"]
    tolerance = 1e-6 if precision == "float32" else 2e-2
    assert losses["other"] == pytest.approx(losses["plain"], rel=tolerance)
    # Otherwise the setting did nothing.
    assert (losses["other"] == losses["plain"]) or precision == "bfloat16"
    assert (losses["other"] != losses["plain"]) or precision == "float32"


def test_checkpoint_metadata_cannot_run_code(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    train(task, LocalContext(tmp_path / "run"))
    (last,) = sorted((tmp_path / "run").glob("checkpoint_*"))[-1:]

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (last / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointException, match="mkdir: refused"):
        train(task, LocalContext(tmp_path / "run"))
    assert not (tmp_path / "attacked").exists()


def test_training_settings_are_validated() -> None:
    with pytest.raises(InvalidInputError, match=r"export_sigma_rel = 0.1: not one of"):
        TrainConfig(images=1, export_sigma_rel=0.1)
    assert TrainConfig(images=1025, global_batch_size=1024).total_images == 2048


def test_the_settings_make_the_order(make_task: MakeTask) -> None:
    stream = make_task().stream
    settings = replace(TRAIN, seed=3, window_groups=5)
    assert settings.stream(stream.uri, stream.manifest) == LatentStream(
        stream.uri, stream.manifest, seed=3, window_groups=5
    )
    with pytest.raises(InvalidInputError, match="window_groups = 0: below 1"):
        replace(TRAIN, window_groups=0)
