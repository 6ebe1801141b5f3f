"""The warm-up of a Wan with slow sinusoids: what it writes, logs and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.artifacts import load_text
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.models.time_scale import SlowTimesteps
from facm_platform.config import Refused
from facm_platform.config.sections import DataConfig, RunConfig, TeacherConfig
from facm_platform.registry import load_artifact
from facm_platform.tracking import Store
from facm_platform.training import distill
from facm_platform.training.context import LocalContext
from facm_platform.training.distill import DistillConfig
from facm_platform.training.loop import train
from facm_platform.training.slow_time import SlowTimeConfig, SlowTimePlan, prepare
from tests.small import artifact_config, write_digits, write_model
from tests.tiny_wan import write_texts
from tests.training.conftest import TRAIN, weights
from tests.training.test_wan import make_teacher

Prepare = Callable[..., SlowTimePlan]
FIRST = "condition_embedder.time_embedder.linear_1.weight"
FAST = 7  # of 16 sinusoids, 1000 * 10000 ** (-k / 16) > 20


@pytest.fixture
def prepared(tmp_path: Path, store: Store) -> Prepare:
    """``prepared(field=value)`` -> the plan for ``teacher``, which is random and hard to fit."""

    def make(**changes: Any) -> SlowTimePlan:
        values: dict[str, Any] = {
            "run": RunConfig(name="slow", storage_uri=str(tmp_path / "runs")),
            "data": DataConfig(uri=str(tmp_path / "set")),
            "teacher": TeacherConfig(uri=str(tmp_path / "teacher")),
            "steps": 20,
            "rows": 4,
            "max_velocity_error": 1.0,
            "output_uri": str(tmp_path / "slow"),
        }
        return prepare(SlowTimeConfig(**values | changes))

    return make


def fast_weights(tensors: dict[str, Tensor]) -> Tensor:
    """Those of all networks that read the sinusoids that are left out."""
    found = [t.unflatten(1, (2, -1))[..., :FAST] for name, t in tensors.items() if FIRST in name]
    return torch.stack(found)


@pytest.mark.parametrize(
    ("boundary", "precision"), [(None, "float32"), (0.5, "float32"), (0.5, "bfloat16")]
)
def test_the_new_teacher_is_the_old_one_but_for_its_time_mlps(
    prepared: Prepare, tmp_path: Path, store: Store, boundary: float | None, precision: str
) -> None:
    make_teacher(tmp_path, boundary)
    old = load_artifact(str(tmp_path / "teacher"))
    plan = prepared(precision=precision)
    assert f"to {tmp_path / 'slow'}" in plan.describe()
    result = plan.execute()
    new = load_artifact(result.artifact_uri)
    before, after = old.model.state_dict(), new.model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "time_embedder" in name}
    assert len(changed) == 4 * old.config.architecture.networks
    assert not fast_weights(after).any()
    embedders = [m for m in new.model.modules() if isinstance(m, SlowTimesteps)]
    assert [m.fast for m in embedders] == [FAST] * old.config.architecture.networks
    assert new.config == replace(
        old.config,
        architecture=replace(old.config.architecture, fastest=20.0),
        teacher_sha256=old.sha256,
        config_hash=new.config.config_hash,
    )
    assert new.config.config_hash != old.config.config_hash

    assert result.metrics["tangent_rms"] < 0.1 * result.metrics["tangent_rms_teacher"]
    assert result.metrics["embedding_error"] < result.metrics["embedding_error_before"]
    run = store.client.get_run(result.run_id)
    assert run.data.tags["facm.model_sha256"] == new.sha256
    assert run.data.tags["facm.teacher_sha256"] == old.sha256
    assert run.data.tags["facm.manifest_sha256"] == plan.manifest.sha256
    assert result.metrics.items() <= run.data.metrics.items()
    files = {item.path for item in store.client.list_artifacts(result.run_id)}
    assert {"slow_time.json", "slow_time.png"} <= files
    report = json.loads(load_text(f"{run.info.artifact_uri}/slow_time.json"))
    for network in ("teacher", "before", "after"):
        for name in ("velocity_error", "anchor_error", "partial_rms", "tangent_rms"):
            history = store.client.get_metric_history(result.run_id, f"{name}/{network}")
            found = {one.step: one.value for one in history}
            times = [round(1000 * time) for time in report[network]["times"]]
            assert found == dict(zip(times, report[network][name], strict=True))


def test_the_report_is_a_table_and_a_picture(
    prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: Store
) -> None:
    make_teacher(tmp_path, None)
    result = prepared().execute()
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["t"])
    rows = [[float(cell) for cell in line.split()] for line in lines[head + 1 : head + 9]]
    assert [len(row) for row in rows] == [11] * 8
    worst = max(row[2] for row in rows)
    assert worst == pytest.approx(result.metrics["velocity_error"], rel=1e-3)
    assert lines[head + 9].startswith("relative error of the embedding: ")
    root = Path(store.client.get_run(result.run_id).info.artifact_uri.removeprefix("file://"))
    assert (root / "slow_time.png").read_bytes().startswith(b"\x89PNG")


def test_settings_count(prepared: Prepare, tmp_path: Path) -> None:
    """Each of them changes what is written."""
    make_teacher(tmp_path, None)
    hashes = set()
    settings = [{}, {"steps": 21}, {"learning_rate": 2e-3}, {"seed": 1}]
    for number, setting in enumerate(settings):
        changes = {"output_uri": str(tmp_path / f"slow{number}"), "fastest": 100.0} | setting
        new = load_artifact(prepared(**changes).execute().artifact_uri)
        assert new.config.architecture.fastest == 100
        hashes.add(new.sha256)
    assert len(hashes) == len(settings)


def test_too_far_from_the_teacher(prepared: Prepare, tmp_path: Path, store: Store) -> None:
    make_teacher(tmp_path, None)
    plan = prepared(max_velocity_error=1e-3)
    with pytest.raises(Refused, match=r"max_velocity_error is 0.001; nothing was written") as got:
        plan.execute()
    assert got.value.result is not None
    assert got.value.result.metrics["velocity_error"] > 1e-3
    assert not (tmp_path / "slow").exists()
    run = store.client.get_run(got.value.result.run_id)
    assert run.info.status == "FAILED"
    assert "slow_time.json" in {f.path for f in store.client.list_artifacts(run.info.run_id)}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_its_student_keeps_the_slow_embedding(
    prepared: Prepare, tmp_path: Path, precision: str
) -> None:
    """Adam moves a weight by its learning rate however small the gradient is; of zero it is 0."""
    make_teacher(tmp_path, 0.5)
    prepared().execute()
    config = DistillConfig(
        run=RunConfig(name="student", storage_uri=str(tmp_path / "runs")),
        data=DataConfig(uri=str(tmp_path / "set")),
        teacher=TeacherConfig(uri=str(tmp_path / "slow")),
        train=replace(TRAIN, precision=precision, weight_decay=0.1, recompute=True),
    )
    task = replace(distill.prepare(config).task("", ""), run_id=None)
    train(task, LocalContext(tmp_path / "context"))
    start, end = load_artifact(str(tmp_path / "slow")), weights(task)
    assert task.artifact.architecture == start.config.architecture
    assert not fast_weights(end).any()
    moved = {
        name for name, tensor in start.model.state_dict().items() if (tensor != end[name]).any()
    }
    assert moved == {name for name in end if "null_text" not in name}


def test_bad_input(prepared: Prepare, tmp_path: Path) -> None:
    make_teacher(tmp_path, None)
    for change, message in (
        ({"steps": 0}, "steps = 0: below 1"),
        ({"rows": 0}, "rows = 0: below 1"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: not positive"),
        ({"max_velocity_error": -1.0}, "max_velocity_error = -1.0: not positive"),
        ({"seed": -1}, "seed = -1: negative"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"precision": "float16"}, "precision = 'float16'"),
        ({"fastest": 0.1}, r"fastest = 0.1: the slowest of 16 sinusoids"),
        ({"output_uri": str(tmp_path / "teacher")}, r"output_uri = .*: it is not empty"),
        ({"teacher": TeacherConfig(uri=str(tmp_path))}, r"teacher.uri = .* not a model artefact"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            prepared(**change)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInputError, match="device = 'cuda': PyTorch sees no GPU here"):
            prepared(device="cuda")


def test_a_teacher_that_does_not_fit(prepared: Prepare, tmp_path: Path) -> None:
    make_teacher(tmp_path, None)
    prepared().execute()
    again = TeacherConfig(uri=str(tmp_path / "slow"))
    with pytest.raises(InvalidInputError, match=r"sinusoids are no faster than 20.0 already"):
        prepared(teacher=again, output_uri=str(tmp_path / "slower"))
    other = DataConfig(uri=str(tmp_path / "other"))
    manifest = write_texts(tmp_path / "other", rows=8)
    (tmp_path / "other" / "manifest.json").unlink()
    replace(manifest, mean=(0.0,) * 4).save(other.uri)
    with pytest.raises(InvalidInputError, match=r"its mean are .*, those of data.uri"):
        prepared(data=other, output_uri=str(tmp_path / "new"))
    manifest = write_digits(tmp_path / "digits", rows=20)
    for role, message in (("teacher", "its network is no Wan"), ("student", "it is a student")):
        config = artifact_config(manifest, role=role)
        write_model(tmp_path / role / "model", config)
        digits = {
            "data": DataConfig(uri=str(tmp_path / "digits")),
            "teacher": TeacherConfig(uri=str(tmp_path / role / "model")),
            "output_uri": str(tmp_path / "new"),
        }
        with pytest.raises(InvalidInputError, match=message):
            prepared(**digits)
