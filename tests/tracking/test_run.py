"""What a run carries, embedded and on a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform.config import config_hash
from facm_platform.tracking import Store, open_run
from facm_platform.tracking.run import flatten, git_commit


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    train: Inner = field(default_factory=Inner)


def test_a_run_carries_its_configuration_and_lineage(store: Store, tmp_path: Path) -> None:
    run = open_run(store, "first", job="distill", config=Config(), tags={"teacher_sha256": "ab"})
    run.log_metrics({"loss": 0.5, "fid/nfe1": 7}, images_seen=256)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/one.txt").write_text("1")
    run.log_artifact(tmp_path / "folder", "many")
    run.log_artifact(tmp_path / "folder/one.txt")
    run.set_tags({"note": "x", "mlflow.note.content": "y"})
    run.finish()

    kept = store.client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "first"
    assert kept.data.params == {"name": "a", "sizes": "[1, 2]", "train.steps": "3"}
    assert kept.data.metrics == {"loss": 0.5, "fid/nfe1": 7.0}
    assert store.client.get_metric_history(run.run_id, "loss")[0].step == 256
    tags = kept.data.tags
    assert tags["facm.run_name"] == "first"
    assert tags["facm.job"] == "distill"
    assert tags["facm.config_hash"] == config_hash(Config())
    assert tags["facm.teacher_sha256"] == "ab"
    assert (tags["facm.note"], tags["mlflow.note.content"]) == ("x", "y")
    assert tags.get("facm.git_commit") == git_commit()
    files = {file.path for file in store.client.list_artifacts(run.run_id)}
    assert files == {"config.yaml", "many", "one.txt"}
    assert run.artifact_uri.endswith(f"{run.run_id}/artifacts")


def test_resume_continues_the_latest_run_of_the_same_name_and_job(store: Store) -> None:
    one = open_run(store, "same", job="distill", config=Config())
    other_job = open_run(store, "same", job="pretrain", config=Config(), resume=True)
    two = open_run(store, "same", job="distill", config=Config())
    assert len({one.run_id, two.run_id, other_job.run_id}) == 3
    two.finish("FAILED")
    # A longer target is a legitimate change: the parameter stays, the YAML shows it.
    longer = Config(train=Inner(steps=9))
    again = open_run(store, "same", job="distill", config=longer, resume=True)
    assert again.run_id == two.run_id
    kept = store.client.get_run(two.run_id)
    assert kept.info.status == "RUNNING"
    assert kept.data.params["train.steps"] == "3"
    assert kept.data.tags["facm.config_hash"] == config_hash(longer)
    yaml = Path(store.client.download_artifacts(two.run_id, "config.yaml")).read_text()
    assert "steps: 9" in yaml


def test_many_and_long_parameters(store: Store) -> None:
    values = {f"k{i:03}": i for i in range(150)} | {"deep": {"text": "x" * 6000 + "y" * 10}}
    flat = dict(flatten(values))
    assert len(flat) == 152
    assert flat["deep.text.part0"] + flat["deep.text.part1"] == values["deep"]["text"]  # type: ignore[index]

    @dataclass(frozen=True, kw_only=True)
    class Long:
        text: str = "x" * 6001

    run = open_run(store, "long", job="test", config=Long())
    assert len(store.client.get_run(run.run_id).data.params["text.part0"]) == 6000


def test_a_name_that_is_no_name_is_refused(store: Store) -> None:
    with pytest.raises(InvalidInputError, match="run_name"):
        open_run(store, "it's/mine", job="test", config=Config())


def test_commit_of_the_code() -> None:
    commit = git_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)
