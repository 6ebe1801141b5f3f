"""Every mistake a newcomer makes: named field, shown value, a remedy, and no cluster started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import facm_platform.cluster
from facm_platform import config as platform_config
from facm_platform import storage
from facm_platform.config import load_config
from facm_platform.latents import LatentManifest
from facm_platform.training import distill, pretrain
from facm_platform.training.run import IDENTITY, identity
from tests.small import ARCHITECTURE, artifact_config, write_digits, write_model

Said = Callable[..., str]


@pytest.fixture
def recipe(tmp_path: Path, digits_uri: str, teacher_uri: str) -> Path:
    """A small distillation that is right in every respect."""
    values = {
        "run": {"name": "student", "storage_uri": str(tmp_path / "runs")},
        "data": {"uri": digits_uri},
        "teacher": {"uri": teacher_uri},
        "train": {"images": 64, "global_batch_size": 8},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture
def said(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """``said("key=value", …)`` -> what jobs/distill.py says when it refuses."""

    def no_cluster() -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(facm_platform.cluster.ray, "init", no_cluster)

    def run(*overrides: str, recipe: str = str(recipe)) -> str:
        arguments = ["--recipe", recipe, *overrides]
        status = platform_config.run_job(
            distill.DistillConfig, distill.prepare, description="", argv=arguments
        )
        assert status == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.imges=5"], ["train.imges = 5", "did you mean 'train.images'?"]),
        (["tran.images=5"], ["tran", "did you mean"]),
        (["train.images=many"], ["train.images = 'many'", "could not be converted"]),
        (["train.images"], ["'train.images'", "key.path=value"]),
        (["objective.p=0"], ["objective.p = 0.0", "not positive", "Use e.g. 0.5"]),
        (["objective.times.std=-1"], ["objective.times.std = -1.0", "above 0"]),
        (["objective.times.kind=normal"], ["objective.times.kind = 'normal'", "logit_normal"]),
        (["objective.conditioning=other"], ["objective.conditioning = 'other'", "auxiliary"]),
        (["objective.guidance.low=2"], ["objective.guidance.low = 2.0", "[2.0, 1.0]"]),
        (
            ["train.global_batch_size=1"],
            ["train.global_batch_size = 1", "workers.max = 2", "larger batches"],
        ),
        (["data.uri=nowhere"], ["data.uri = ", "nowhere", "manifest.json", "jobs/encode.py"]),
        (["teacher.uri=nowhere"], ["teacher.uri = '", "nowhere'", "no such folder"]),
        (["run.name=a/b"], ["run.name = 'a/b'", "Use letters"]),
        (["run.tracking.uri=here"], ["run.tracking.uri = 'here'", "sqlite:"]),
        (["run.storage_uri=gs://x/y"], ["run.storage_uri = 'gs://x/y'", "s3://"]),
    ],
)
def test_message(said: Said, overrides: Sequence[str], expected: Sequence[str]) -> None:
    message = said(*overrides)
    assert message.startswith("error: ")
    assert all(piece in message for piece in expected), message


def test_recipe_that_does_not_exist(said: Said) -> None:
    message = said(recipe="digits_distil")
    assert "--recipe = 'digits_distil'" in message
    assert "did you mean 'digits_distill'?" in message


def test_value_that_was_not_given(said: Said, tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("data: {uri: somewhere}\n")
    assert "run.name = '': no value was given. Add run.name=VALUE" in said(recipe=str(file))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"in_channels": 3}, "the teacher's latents are (3, 8, 8), those of data.uri (1, 8, 8)"),
        ({"input_size": 16}, "the teacher's latents are (1, 16, 16)"),
        ({"num_classes": 7}, "the teacher has 7 classes, data.uri 10"),
    ],
)
def test_teacher_of_another_shape(
    said: Said, tmp_path: Path, digits_uri: str, change: dict[str, int], expected: str
) -> None:
    message = said(f"teacher.uri={other_teacher(tmp_path, digits_uri, change)}")
    assert "teacher.uri = " in message
    assert expected in message
    assert "Use the latent set the teacher was trained on" in message


def test_teacher_under_another_normalisation(said: Said, tmp_path: Path, digits_uri: str) -> None:
    uri = other_teacher(tmp_path, digits_uri, {}, normalisation_mean=(0.5,))
    assert "another normalisation" in said(f"teacher.uri={uri}")


def test_a_set_with_a_flipped_byte(said: Said, tmp_path: Path) -> None:
    manifest = write_digits(tmp_path / "set", rows=100)
    part = tmp_path / "set" / manifest.parts[0].name
    content = bytearray(part.read_bytes())
    content[5000] ^= 1
    part.write_bytes(content)
    message = said(f"data.uri={tmp_path / 'set'}")
    assert "data.uri = " in message
    assert "part-00000.parquet: its sha256 is" in message


def test_run_name_with_another_config(said: Said, recipe: Path, tmp_path: Path) -> None:
    kept = load_config(distill.DistillConfig, str(recipe), ["objective.lambda_fm=0.5"])
    folder = tmp_path / "runs" / "student"
    folder.mkdir(parents=True)
    plan = distill.prepare(kept)
    made_from = distill.lineage(plan.manifest, plan.teacher)
    (folder / IDENTITY).write_text(identity(kept, made_from))
    message = said()
    assert "run.name = 'student'" in message
    assert "-    lambda_fm: 0.5" in message
    assert "+    lambda_fm: 1.0" in message
    # The same config and inputs are no other run: it resumes.
    distill.prepare(kept)
    # A teacher that was trained anew under the same address is another one.
    (folder / IDENTITY).write_text(identity(kept, made_from | {"teacher_sha256": "another"}))
    assert "-  teacher_sha256: another" in said("objective.lambda_fm=0.5")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("flip", ["0.distcp", "missing or damaged: {", "sha256"]),
        ("cut", ["0.distcp", "missing or damaged: 9 bytes, where checkpoint.json says 10"]),
        ("remove", ["0.distcp", "missing or damaged: None bytes"]),
        ("all", ["checkpoint_000000000032", "it has no checkpoint.json"]),
    ],
)
def test_a_run_whose_last_checkpoint_is_damaged(
    said: Said, recipe: Path, tmp_path: Path, damage: str, expected: Sequence[str]
) -> None:
    folder = tmp_path / "runs" / "student"
    last = folder / "checkpoint_000000000032"
    last.mkdir(parents=True)
    shard, record = last / "0.distcp", last / "checkpoint.json"
    shard.write_bytes(b"0123456789")
    described = {"bytes": 10, "sha256": storage.file_sha256(shard)}
    record.write_text(json.dumps({"format": 1, "files": {shard.name: described}}))
    snapshot = {"latest_checkpoint_result": {"checkpoint_dir_name": last.name}}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    distill.prepare(load_config(distill.DistillConfig, str(recipe)))

    if damage in ("flip", "cut"):
        shard.write_bytes(b"0123456788"[: 10 if damage == "flip" else 9])
    else:
        (shard if damage == "remove" else record).unlink()
    message = said()
    assert message.startswith("error: checkpoint = ")
    assert "train under another run.name" in message
    assert all(piece in message for piece in expected), message


def test_job_without_a_folder_that_lasts(
    said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    assert "Give an absolute path or an s3:// address" in said("run.storage_uri=runs")


def test_network_that_does_not_fit_the_latents(digits_uri: str, tmp_path: Path) -> None:
    overrides = [f"data.uri={digits_uri}", f"run.storage_uri={tmp_path}", "network.patch_size=3"]
    settings = load_config(pretrain.PretrainConfig, "digits_pretrain", overrides)
    with pytest.raises(ValueError, match=r"network.patch_size = 3: does not divide input_size = 8"):
        pretrain.prepare(settings)


def test_dry_run_starts_nothing_and_tells_the_plan(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--recipe", str(recipe), "--dry-run"]
    status = platform_config.run_job(
        distill.DistillConfig, distill.prepare, description="", argv=arguments
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "64 images in batches of 8 on 2 workers" in out
    assert "MiB for each of 2 workers" in out
    assert "TFLOP a step for each of them" in out
    assert not (tmp_path / "runs").exists()


def test_printed_config_reads_back_equal(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--recipe", str(recipe), "objective.p=0.7", "train.betas=[0.9,0.95]"]
    platform_config.run_job(
        distill.DistillConfig,
        distill.prepare,
        description="",
        argv=[*arguments, "--print-config"],
    )
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = load_config(distill.DistillConfig, str(printed))
    assert again == load_config(distill.DistillConfig, str(recipe), arguments[2:])
    assert (again.objective.p, again.train.betas) == (0.7, (0.9, 0.95))


def other_teacher(
    tmp_path: Path, digits_uri: str, change: dict[str, int], **settings: object
) -> str:
    """Artefact of a teacher that differs in its architecture or settings."""
    architecture = replace(ARCHITECTURE, **change)  # type: ignore[arg-type]
    manifest = LatentManifest.load(digits_uri)
    channels = architecture.in_channels
    settings = {
        "normalisation_mean": manifest.mean * channels,
        "normalisation_std": manifest.std * channels,
    } | settings
    config = artifact_config(manifest, architecture=architecture, **settings)
    folder = tmp_path / "other"
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder, config)
    return str(folder)
