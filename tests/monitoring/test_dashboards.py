"""Grafana's dashboards: what the code makes, in PromQL that is read, of metrics there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.gauges import GAUGES
from facm_platform.training.loop import train
from tests.monitoring.monitored import (
    DASHBOARDS,
    metrics_of,
    needs_prometheus,
    panel_queries,
    promtool,
    rules,
)
from tests.training.conftest import TRAIN, MakeTask, make_task

__all__ = ["make_task"]

RAYS = {f"ray_{name}" for name in METRICS_GAUGES}
PROMETHEUS = {"up", "ALERTS"}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}


def test_committed_files_are_what_the_code_makes(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "facm_monitoring", str(tmp_path)]
    paths = [str(DASHBOARDS), str(DASHBOARDS.parent), str(DASHBOARDS.parent / "platform")]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": ""}
    subprocess.run(line, env=environment, check=True, capture_output=True)
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text() for file in (DASHBOARDS / "grafana").glob("*.json")}
    assert made == kept


@needs_prometheus
def test_prometheus_reads_every_query(tmp_path: Path) -> None:
    for number, query in enumerate(panel_queries()):
        file = tmp_path / f"{number}.yml"
        rule = {"record": "panel", "expr": query.expr}
        file.write_text(yaml.safe_dump({"groups": [{"name": "panel", "rules": [rule]}]}))
        done = promtool("check", "rules", file)
        assert done.returncode == 0, f"{query}: {done.stdout}{done.stderr}"


class Published(LocalContext):
    """Keeps the names that monitoring would see."""

    names: set[str]

    def publish(self, metrics: dict[str, float]) -> None:
        self.names |= {"ray_facm_" + name.replace("/", "_") for name in metrics}


@pytest.fixture
def exported(make_task: MakeTask, tmp_path: Path) -> set[str]:
    """Metrics that a real run tells, and those that Ray Train's processes add."""
    context = Published(tmp_path / "run")
    context.names = {f"ray_facm_{name}" for name in GAUGES}
    with single_process_group():
        train(make_task(train=TRAIN), context)
    # Bins without rows have no loss; 96 rows do not fill them all.
    assert any(name.startswith("ray_facm_loss_fm_t") for name in context.names)
    bins = {f"ray_facm_loss_{task}_t{index}" for task in ("fm", "cm") for index in range(8)}
    return context.names | bins


def test_every_metric_that_is_read_exists(exported: set[str]) -> None:
    known = exported | RAYS | PROMETHEUS | RECORDED
    for expr in [*(query.expr for query in panel_queries()), *(rule["expr"] for rule in rules())]:
        names = metrics_of(expr)
        assert names, expr
        assert names <= known, expr
    # A misspelt name is another one.
    for expr in ["rate(ray_facm_losss[5m])", 'sum by (run) (run:facm_image_seen:max{a="b"}) / 2']:
        assert not metrics_of(expr) <= known


def test_every_recorded_series_is_read() -> None:
    read = [metrics_of(q.expr) for q in panel_queries()] + [metrics_of(r["expr"]) for r in rules()]
    assert set.union(*read) >= RECORDED


def test_training_is_told_by_run() -> None:
    """Series carry the id of a worker, and end with it."""
    for expr in [*(query.expr for query in panel_queries()), *(rule["expr"] for rule in rules())]:
        for found in re.finditer(r"ray_facm_", expr):
            before = expr[: found.start()]
            assert re.search(r"max by \(run_id, run\) \((ray_facm_\w+ or )?$", before), expr


def test_names_are_found_in_an_expression() -> None:
    expr = 'max by (run_id, run) (a{b="c"}) + on (d) (e offset 5m or 0 * f:g:h) unless vector(1)'
    assert metrics_of(expr) == {"a", "e", "f:g:h"}
    assert metrics_of("changes(x[1h]) >= 2") == {"x"}
