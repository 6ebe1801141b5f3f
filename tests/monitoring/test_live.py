"""A real run, scraped by a real Prometheus: every query of every panel has an answer."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from facm_platform.training.gauges import GAUGES
from tests.conftest import free_port
from tests.jobs.conftest import command, environment
from tests.monitoring.monitored import CONFIG, RULES, PanelQuery, needs_prometheus, panel_queries
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), needs_prometheus]

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
    yield f"http://{address}"
    process.terminate()
    process.wait(timeout=30)


@pytest.fixture
def run(world: World, tmp_path: Path, ray_folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A distillation of a minute and a half, with a Ray of its own."""
    options = [
        *world.options("live", tmp_path / "runs"),
        "train.images=1000000",
        "train.max_hours=0.025",
        "train.global_batch_size=64",
        "train.log_images=256",
        "train.health_images=256",
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
    yield process
    process.terminate()
    process.wait(timeout=60)


def ask(prometheus: str, expr: str) -> list[dict[str, Any]]:
    """What an instant query gives."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def test_every_panel_of_a_real_run_has_data(
    run: subprocess.Popen[bytes], prometheus: str, ray_folder: Path, tmp_path: Path
) -> None:
    queries = set(panel_queries())
    seen: dict[PanelQuery, list[dict[str, Any]]] = {}
    while run.poll() is None:
        time.sleep(2)
        for query in queries - seen.keys():
            if found := ask(prometheus, query.expr):
                seen[query] = found
    output = (tmp_path / "run.log").read_text()
    assert run.returncode == 0, output[-3000:]
    silent = {(query.panel, query.ref) for query in queries - seen.keys()}
    assert silent == WITHOUT_GPU

    run_id = json.loads(output.strip().splitlines()[-1])["run_id"]
    labels = [
        one["metric"] for query, found in seen.items() for one in found if "run" in one["metric"]
    ]
    assert {(one["run"], one["run_id"]) for one in labels} == {("live", run_id)}
    assert len(labels) > 30

    # Those that are told once have stayed: of a minute of scrapes, two seconds apart, hardly one
    # is missing.
    for name in GAUGES:
        (told,) = ask(prometheus, f"max(max_over_time(count_over_time(ray_facm_{name}[1m])[5m:]))")
        assert float(told["value"][1]) >= 25, name
    assert not ask(prometheus, 'max_over_time(ALERTS{alertname=~"Facm.+"}[5m])')

    # What the provisioning of Grafana leads to, beside ours.
    theirs = ray_folder / "ray" / "session_latest" / "metrics" / "grafana" / "dashboards"
    assert "train_grafana_dashboard.json" in {file.name for file in theirs.iterdir()}
