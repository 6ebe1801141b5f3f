"""jobs/benchmark.py: measured on the cluster, kept in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow.artifacts
import pytest

from facm_platform.benchmark import BenchmarkJobConfig, prepare
from facm_platform.config import run_job
from facm_platform.tracking import TrackingConfig, connect_store

SMALL = "{hidden_size: 32, depth: 2, num_heads: 2, input_size: 4, in_channels: 4}"


def command(root: Path, *more: str) -> list[str]:
    return [
        "run.name=speed",
        f"run.storage_uri={root}",
        f"run.tracking.uri=sqlite:///{root}/mlflow.db",
        "benchmark.preset=B/1",
        f"benchmark.architecture={SMALL}",
        "benchmark.batch_size=2",
        "benchmark.steps=1",
        "benchmark.modes=[eager]",
        "benchmark.baseline=true",
        *more,
    ]


@pytest.mark.usefixtures("ray_cluster")
def test_the_report_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path)
    assert run_job(BenchmarkJobConfig, prepare, description="", argv=arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["metrics"]["baseline_time_ratio"] == 1
    assert 0 < result["metrics"]["eager_memory_ratio"] < 1
    assert table[-1].split()[0] == "eager"

    store = connect_store(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), str(tmp_path))
    metrics = store.client.get_run(result["run_id"]).data.metrics
    assert metrics == pytest.approx(result["metrics"])
    kept = mlflow.artifacts.download_artifacts(
        f"{result['artifact_uri']}/benchmark.json", dst_path=str(tmp_path / "kept")
    )
    report = json.loads(Path(kept).read_text())
    assert report["config"]["architecture"]["depth"] == 2
    assert report["modes"].keys() == {"baseline", "eager"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("benchmark.preset=XXL", "preset = 'XXL'"),
        ("benchmark.architecture={depht: 2}", "architecture = 'depht'"),
        ("benchmark.modes=[fast]", "benchmark.modes = 'fast'"),
        ("run.name=a/b", "run.name = 'a/b'"),
        ("cpus=0", "cpus = 0"),
    ],
)
def test_bad_input_starts_nothing(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(tmp_path, override)
    assert run_job(BenchmarkJobConfig, prepare, description="", argv=arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*command(tmp_path), "--dry-run"]
    assert run_job(BenchmarkJobConfig, prepare, description="", argv=arguments) == 0
    assert "B/1" in capsys.readouterr().out
