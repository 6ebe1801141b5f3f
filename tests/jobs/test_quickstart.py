"""What a newcomer sees first, in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from tests.jobs.conftest import RunJob, last_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_quickstart_gives_a_one_step_generator(run_job: RunJob, tmp_path: Path) -> None:
    done = run_job("quickstart", timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_line(done.stdout)
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    teacher, student = summary["teacher"], summary["student"]
    assert set(teacher) == {"1", "2", "4", "50"}
    assert set(student) == {"1", "2", "4"}

    assert student["1"]["fid"] <= teacher["1"]["fid"] / 10
    assert student["1"]["fid"] <= 1.2 * teacher["50"]["fid"]
    assert student["2"]["fid"] <= teacher["50"]["fid"]
    assert student["1"]["agreement"] >= 0.9
    assert result["metrics"]["fid_nfe1"] == student["1"]["fid"]

    with Image.open(summary["sample_sheet"]) as sheet:
        assert min(sheet.size) > 300
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    model = summary["model"]
    version = client.get_model_version_by_alias(model["name"], model["alias"])
    assert str(version.version) == str(model["version"])
    for run_id in summary["run_ids"].values():
        assert client.get_run(run_id).info.status == "FINISHED"

    promoted = run_job("promote", f"model={model['name']}")
    assert promoted.returncode == 0, promoted.stderr
    champion = client.get_model_version_by_alias(model["name"], "champion")
    assert str(champion.version) == str(model["version"])
    again = run_job("promote", f"model={model['name']}")
    assert again.returncode == 1
    assert "refused" in again.stderr
