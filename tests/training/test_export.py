"""Artefacts out of checkpoints: averages that were tracked, and others put together from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.registry import load_artifact
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.export import export
from facm_platform.training.loop import train
from tests.training.conftest import TRAIN, MakeTask, weights

# Learning fast enough that the averages differ.
SETTINGS = replace(TRAIN, images=320, learning_rate=1e-2, checkpoint_images=32)
LAST = "checkpoint_000000000320"


@pytest.fixture
def run(make_task: MakeTask, tmp_path: Path) -> Path:
    """Folder of a run that tracked σ_rel 0.05 and 0.2; ten checkpoints."""
    with single_process_group():
        train(make_task(train=SETTINGS), LocalContext(tmp_path / "run"))
    return tmp_path / "run"


def exported(run: Path, checkpoint: str, sigma_rel: float | None = None) -> dict[str, torch.Tensor]:
    output = run.parent / "exported"
    result = export(str(run / checkpoint), str(output), sigma_rel)
    artifact = load_artifact(result.artifact_uri)
    assert artifact.config.images_seen == result.metrics["images_seen"] == int(checkpoint[-12:])
    assert artifact.config.ema_sigma_rel == result.metrics["ema_sigma_rel"]
    return load_file(output / "model.safetensors")


def test_the_last_checkpoint_holds_what_the_run_exported(run: Path, make_task: MakeTask) -> None:
    expected, got = weights(make_task()), exported(run, LAST)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_any_average_of_any_checkpoint(run: Path, make_task: MakeTask, tmp_path: Path) -> None:
    settings = replace(SETTINGS, images=160, export_sigma_rel=0.05)
    task = make_task(train=settings, folder_uri=str(tmp_path / "short"))
    with single_process_group():
        train(task, LocalContext(tmp_path / "short"))
    expected, got = weights(task), exported(run, "checkpoint_000000000160", 0.05)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("sigma_rel", [0.1, 0.15])
def test_an_average_that_was_not_tracked(
    run: Path, make_task: MakeTask, tmp_path: Path, sigma_rel: float
) -> None:
    """Within 1 % of the one tracked all along; also when only the averages are left."""
    for checkpoint in sorted(run.glob("checkpoint_*"))[:-1]:
        for file in checkpoint.iterdir():
            file.unlink()
    tracked = replace(SETTINGS, ema_sigma_rels=(sigma_rel,), export_sigma_rel=sigma_rel)
    task = make_task(train=tracked, folder_uri=str(tmp_path / "tracked"))
    with single_process_group():
        train(task, LocalContext(tmp_path / "tracked"))
    expected, got = weights(task), exported(run, LAST, sigma_rel)

    def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5

    zero = {name: torch.zeros_like(value) for name, value in expected.items()}
    assert distance(got, expected) < 0.01 * distance(expected, zero)
    # Weights hardly move from where they began: no tracked average comes nearly as close.
    (tmp_path / "exported").rename(tmp_path / "other")
    for other in (0.05, 0.2):
        near = exported(run, LAST, other)
        assert distance(got, expected) < 0.1 * distance(near, expected)
        (tmp_path / "exported").rename(tmp_path / f"other-{other}")


def test_an_average_that_the_snapshots_do_not_reach(run: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"sigma_rel = 0.01: .*add up to .*Use one of"):
        exported(run, "checkpoint_000000000032", 0.01)


def test_what_is_no_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"checkpoint = .*no such folder"):
        exported(run, "checkpoint_000000000001")
    with pytest.raises(InvalidInputError, match=r"not a checkpoint, or half of one"):
        export(str(run / "artifact"), str(run.parent / "exported"))
    shard = run / LAST / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match=r"__0_0.distcp': missing or damaged"):
        exported(run, LAST)
    storage.write_bytes(str(run.parent / "exported" / "file"), b"")
    with pytest.raises(InvalidInputError, match=r"output = .*not empty"):
        exported(run, LAST)
