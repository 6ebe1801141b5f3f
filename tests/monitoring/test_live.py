"""A real run, scraped by a real Prometheus: every query of every panel has an answer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from facm_platform.training.gauges import GAUGES
from tests.conftest import answers_on, free_port
from tests.jobs.conftest import command, environment
from tests.monitoring.monitored import CONFIG, RULES, PanelQuery, needs_prometheus, panel_queries
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), needs_prometheus]

DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"

# Ray tells these where there is a GPU.
WITHOUT_GPU = {("GPU memory", "A"), ("GPU", "A")}


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its files; short, because of the sockets' names."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as kept:
        yield Path(kept)


@pytest.fixture
def prometheus(tmp_path: Path, ray_folder: Path) -> Iterator[str]:
    """Address of one with our configuration, which looks every two seconds."""
    config = CONFIG.read_text()
    assert DISCOVERY in config
    config = config.replace(DISCOVERY, str(ray_folder / "ray" / Path(DISCOVERY).name))
    written = yaml.safe_load(config)
    written["global"] = dict.fromkeys(written["global"], "2s")
    written["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "2s"
    written["rule_files"] = [str(file) for file in RULES]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(written))
    address = f"127.0.0.1:{free_port()}"
    line = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}"]
    line += [f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not answers_on(int(address.rpartition(":")[2])):
            assert process.poll() is None, (tmp_path / "prometheus.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def run(world: World, tmp_path: Path, ray_folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A distillation that ends 72 s after its last restart, with a Ray of its own."""
    options = [
        *world.options("live", tmp_path / "runs"),
        "train.images=1000000",
        "train.max_hours=0.02",
        "train.global_batch_size=64",
        "train.log_images=256",
        "train.health_images=1024",
        "train.checkpoint_images=2048",
        f"validation.features_uri={world.features}",
        "validation.samples=200",
    ]
    with (tmp_path / "run.log").open("wb") as log:
        process = subprocess.Popen(
            command("distill", *options),
            env=environment() | {"RAY_TMPDIR": str(ray_folder)},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(prometheus: str, expr: str) -> list[dict[str, Any]]:
    """What an instant query gives."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def number(prometheus: str, expr: str) -> float:
    """Of a query that gives one."""
    (found,) = ask(prometheus, expr)
    return float(found["value"][1])


def times(series: dict[str, Any]) -> list[float]:
    """When Prometheus saw it."""
    return [float(time) for time, _ in series["values"]]


def kill_rank_zero(log: Path) -> None:
    """As if its machine were lost."""
    (pid,) = re.findall(r"worker 0 of 2: process (\d+)", log.read_text())
    os.kill(int(pid), signal.SIGKILL)


def test_every_panel_of_a_real_run_has_data(
    run: subprocess.Popen[bytes], prometheus: str, ray_folder: Path, tmp_path: Path
) -> None:
    queries, log, killed = set(panel_queries()), tmp_path / "run.log", False
    seen: dict[PanelQuery, list[dict[str, Any]]] = {}
    while run.poll() is None:
        time.sleep(2)
        for query in queries - seen.keys():
            if found := ask(prometheus, query.expr):
                seen[query] = found
        if not killed and ask(prometheus, "run:facm_begun_seconds:max"):
            kill_rank_zero(log)
            killed = True
    assert run.returncode == 0, log.read_text()[-3000:]
    silent = {(query.panel, query.ref) for query in queries - seen.keys()}
    assert silent == WITHOUT_GPU

    run_id = json.loads(log.read_text().strip().splitlines()[-1])["run_id"]
    labels = [one["metric"] for found in seen.values() for one in found if "run" in one["metric"]]
    assert {(one["run"], one["run_id"]) for one in labels} == {("live", run_id)}
    assert len(labels) > 30

    # What is told once stays, for longer than the 20 s that Ray's agent would keep it.
    for name in GAUGES:
        series = [times(one) for one in ask(prometheus, f"ray_facm_{name}[5m]")]
        gaps = [later - told for told_at in series for told, later in pairwise(told_at)]
        assert max(gaps) < 8, name
        assert max(told_at[-1] - told_at[0] for told_at in series) > 30, name
    # The killed worker and its successor: two series, one of the run, which changed once.
    assert number(prometheus, "count(max_over_time(ray_facm_begun_seconds[5m]))") == 2
    assert number(prometheus, "changes(run:facm_begun_seconds:max[5m])") == 1
    begun, saved = "ray_facm_begun_seconds[5m]", "ray_facm_saved_seconds[5m]"
    after = f"max(max_over_time({saved})) - max(max_over_time({begun}))"
    assert 0 < number(prometheus, after) < 100
    assert not ask(prometheus, 'max_over_time(ALERTS{alertstate="firing"}[5m])')

    # What the provisioning of Grafana leads to, beside ours.
    theirs = ray_folder / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    assert "train_grafana_dashboard.json" in {file.name for file in theirs.iterdir()}
