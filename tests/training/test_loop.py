"""The loop without a cluster: exact resume, skipped steps, what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.objectives import FACMConfig
from facm_platform import storage
from facm_platform.latents import Batch, LatentStream
from facm_platform.registry import load_artifact
from facm_platform.training.checkpoint import RECORD, check_stored
from facm_platform.training.config import TrainConfig
from facm_platform.training.context import LocalContext
from facm_platform.training.loop import train
from facm_platform.training.task import Hopeless, TrainingTask
from tests.training.conftest import (
    TRAIN,
    Interrupted,
    InterruptedContext,
    MakeTask,
    plain_training,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_group")


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
    checkpoints = [path.name for path in (tmp_path / "halves").glob("checkpoint_*")]
    assert checkpoints == ["checkpoint_000000000032"]
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
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_task: MakeTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = make_task()
    metrics = train(task, InterruptedContext(tmp_path / "run", poison=5))
    assert metrics["skipped_steps"] == 1
    assert "step skipped" in capsys.readouterr().out
    assert all(torch.isfinite(value).all() for value in weights(task).values())


def test_a_checkpoint_that_was_due_then_comes_with_the_next_step(
    make_task: MakeTask, tmp_path: Path
) -> None:
    train(make_task(), InterruptedContext(tmp_path / "run", poison=3))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert names == [f"checkpoint_{images:012d}" for images in (40, 64, 96)]


@pytest.mark.parametrize(
    ("may_be_lost", "commits"), [(None, [64, 96]), (32, [32, 64]), (40, [40, 72]), (48, [48, 80])]
)
def test_training_waits_where_more_would_be_lost(
    make_task: MakeTask, tmp_path: Path, may_be_lost: int | None, commits: list[int]
) -> None:
    """The checkpoints at 32 and 64 of 96 images, of 8 a step; that at 96 is the run's end."""
    waited = []

    class Waiting(LocalContext):
        def moved(self, images_seen: int, doing: str) -> None:
            self.images_seen = images_seen

        def commit_checkpoint(self) -> None:
            waited.append(self.images_seen)

    task = make_task(train=replace(TRAIN, max_lost_images=may_be_lost))
    train(task, Waiting(tmp_path / "run"))
    assert waited == commits


def test_too_many_of_them_end_the_run(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    with pytest.raises(Hopeless, match=r"10 steps in a row.*learning_rate"):
        train(task, InterruptedContext(tmp_path / "run", poison=-2))


def test_a_run_that_diverges_goes_back_and_on_with_other_draws(
    make_task: MakeTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 6 and 7 of 12 are bad; a checkpoint is at 4. The second time they are good."""
    settings = replace(TRAIN, max_skipped_in_a_row=2, max_rollbacks=1)
    task = make_task(train=settings, folder_uri=str(tmp_path / "run"))

    class Bad(LocalContext):
        bad: ClassVar[list[int]] = [6, 7]

        def batches(self, *args: Any) -> Iterator[Batch]:
            for index, batch in enumerate(super().batches(*args), args[1] // 8):
                if index in self.bad:
                    self.bad.remove(index)
                    batch = replace(batch, latents=batch.latents * float("nan"))
                yield batch

    metrics = train(task, Bad(tmp_path / "run"))
    assert (metrics["rollbacks"], metrics["skipped_steps"]) == (1, 0)
    assert "resumed at 32 images" in capsys.readouterr().out
    rolled_back = weights(task)

    # As if it had been interrupted there, and gone on with the draws of the first rollback.
    task = make_task(train=settings, folder_uri=str(tmp_path / "other"))
    with pytest.raises(Interrupted):
        train(task, InterruptedContext(tmp_path / "other", batches_left=4))
    record = tmp_path / "other" / "checkpoint_000000000032" / RECORD
    record.write_text(record.read_text().replace('"rollbacks": 0', '"rollbacks": 1'))
    train(task, LocalContext(tmp_path / "other"))
    expected = weights(task)
    assert all(torch.equal(expected[name], rolled_back[name]) for name in expected)


def test_one_rollback_more_than_allowed_ends_the_run(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(train=replace(TRAIN, max_skipped_in_a_row=2, max_rollbacks=3))

    class Bad(LocalContext):
        def batches(self, *args: Any) -> Iterator[Batch]:
            for index, batch in enumerate(super().batches(*args), args[1] // 8):
                bad = index >= 6
                yield replace(batch, latents=batch.latents * float("nan")) if bad else batch

    with pytest.raises(Hopeless, match=r"2 steps in a row were not finite, up to 64 images"):
        train(task, Bad(tmp_path / "run"))
    kept = list(Path(task.skipped_uri).glob("*/rank-0.safetensors"))
    assert len(kept) == 2


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_a_batch_in_several_passes_is_the_same_batch(
    make_task: MakeTask, tmp_path: Path, micro_batch_size: int
) -> None:
    task = make_task(train=replace(TRAIN, micro_batch_size=micro_batch_size))
    train(task, LocalContext(tmp_path / "run"))
    got = weights(task)
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("options", [{"offload": True}, {"compile": True}, {"fused": True}])
def test_options_that_change_no_number(
    make_task: MakeTask, tmp_path: Path, options: dict[str, Any]
) -> None:
    task = make_task(train=replace(TRAIN, images=32, **options))
    train(task, LocalContext(tmp_path / "run"))
    got = weights(task)
    plain = make_task(train=replace(TRAIN, images=32), folder_uri=str(tmp_path / "plain"))
    train(plain, LocalContext(tmp_path / "plain"))
    for name, expected in weights(plain).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)


def test_a_run_that_ends_by_the_clock_goes_on_from_there(
    make_task: MakeTask, tmp_path: Path
) -> None:
    """An hour is 3,600 s; the clock of this one is over after the first step."""
    limited = make_task(train=replace(TRAIN, max_hours=1e-9))
    for images in (8, 16):
        train(limited, LocalContext(tmp_path / "run"))
        assert load_artifact(limited.artifact_uri).config.images_seen == images
    task = make_task()
    train(task, LocalContext(tmp_path / "run"))
    got = weights(task)
    for name, expected in plain_training(task).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 0.8, 0.6, 0.2]),
        ("cosine", [0.5, 1, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6, 0.2]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    settings = TrainConfig(
        images=996,
        global_batch_size=100,
        warmup_images=200,
        learning_rate=1.0,
        schedule=schedule,
        final_learning_rate=0.2,
    )
    found = [settings.learning_rate_at(images) for images in (100, 200, 400, 600, 1000)]
    assert found == pytest.approx(expected)


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


@pytest.fixture
def checkpoint(make_task: MakeTask, tmp_path: Path) -> Path:
    """The last one of a run that can be continued by training `make_task()` in "run"."""
    train(make_task(), LocalContext(tmp_path / "run"))
    return max((tmp_path / "run").glob("checkpoint_*"))


def refused(task: TrainingTask, folder: Path) -> str:
    """What the loop says of the last checkpoint in `folder`."""
    with pytest.raises(Hopeless) as caught:
        train(task, LocalContext(folder))
    assert isinstance(caught.value.args[0], InvalidInputError)
    return str(caught.value.args[0])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name(
    make_task: MakeTask, checkpoint: Path, damage: str
) -> None:
    shard = checkpoint / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()
    if damage != "remove":
        shard.write_bytes(content if damage == "flip" else content[:-1])
    message = refused(make_task(), checkpoint.parent)
    assert f"checkpoint = '{shard}': missing or damaged" in message
    assert "Restore the file" in message


def test_a_damaged_checkpoint_of_a_store_is_named_by_its_address(
    checkpoint: Path, bucket: str
) -> None:
    uri = f"{bucket}/run/{checkpoint.name}"
    storage.upload_folder(checkpoint, uri)
    check_stored(uri)
    content = bytearray(storage.read_bytes(f"{uri}/__0_0.distcp"))
    content[len(content) // 2] ^= 1
    storage.write_bytes(f"{uri}/__0_0.distcp", bytes(content))
    with pytest.raises(InvalidInputError, match=f"checkpoint = '{uri}/__0_0.distcp': missing or"):
        check_stored(uri)


def test_half_a_checkpoint_is_none(make_task: MakeTask, checkpoint: Path) -> None:
    (checkpoint / RECORD).unlink()
    assert "not a checkpoint, or half of one" in refused(make_task(), checkpoint.parent)


def test_a_checkpoint_of_another_network_is_refused(make_task: MakeTask, checkpoint: Path) -> None:
    task = make_task(objective=FACMConfig(conditioning="auxiliary"))
    architecture = replace(task.artifact.architecture, second_time=True)
    artifact = replace(task.artifact, architecture=architecture, conditioning="auxiliary")
    message = refused(replace(task, artifact=artifact), checkpoint.parent)
    assert "of another network or recipe: missing ema.0.05.r_embedder" in message
    assert "unexpected" not in message


def test_checkpoint_metadata_cannot_run_code(
    make_task: MakeTask, checkpoint: Path, tmp_path: Path
) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    forged = pickle.dumps(Attack())
    (checkpoint / ".metadata").write_bytes(forged)
    assert "missing or damaged" in refused(make_task(), checkpoint.parent)

    record = json.loads((checkpoint / RECORD).read_text())
    sha256 = hashlib.sha256(forged).hexdigest()
    record["files"][".metadata"] = {"bytes": len(forged), "sha256": sha256}
    (checkpoint / RECORD).write_text(json.dumps(record))
    assert "mkdir: refused" in refused(make_task(), checkpoint.parent)
    assert not (tmp_path / "attacked").exists()


def test_training_settings_are_validated() -> None:
    with pytest.raises(InvalidInputError, match=r"export_sigma_rel = 0.1: not one of"):
        TrainConfig(images=1, export_sigma_rel=0.1)
    with pytest.raises(InvalidInputError, match=r"max_lost_images = 7: less than .* = 8, the"):
        TrainConfig(images=1, checkpoint_images=8, max_lost_images=7)
    assert TrainConfig(images=1025, global_batch_size=1024).total_images == 2048


def test_the_settings_make_the_order(make_task: MakeTask) -> None:
    stream = make_task().stream
    settings = replace(TRAIN, seed=3, window_groups=5)
    assert settings.stream(stream.uri, stream.manifest) == LatentStream(
        stream.uri, stream.manifest, seed=3, window_groups=5
    )
    with pytest.raises(InvalidInputError, match="window_groups = 0: below 1"):
        replace(TRAIN, window_groups=0)
