"""How long the pages take of a store of many runs: ``python -m facm_dashboards.benchmark``."""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from starlette.testclient import TestClient

from facm_dashboards.app import create_app
from facm_dashboards.config import BoardConfig
from facm_platform.tracking import Store, TrackingConfig, connect_store

MOST_SECONDS = 1.0

_BINS = [f"loss_fm/t{k}" for k in range(8)]
_NAMES = ["loss", "loss_fm", "loss_cm", "tangent_rms", "clipped_share", "gradient_norm"]
_NAMES += ["images_per_second", "memory_mib", "anchor_drift", "gradient_cosine"]
_NAMES += ["fid_nfe1", "fid_nfe1_error", *_BINS]
_STEP_IMAGES = 5120


def write_store(folder: Path, runs: int, metrics: int, points: int) -> tuple[Store, list[str]]:
    """A store of so many distillations, each with so many metrics of so many points.

    The runs are made by MLflow, their numbers by SQL: two million of them take MLflow an hour.
    """
    store = connect_store(TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"), folder)
    names = (_NAMES + [f"more_{k}" for k in range(metrics)])[:metrics]
    tags = {"facm.job": "distill", "facm.config_hash": "0" * 16}
    ids = []
    for number in range(runs):
        name = {"mlflow.runName": f"run-{number:04d}", "facm.run_name": f"run-{number:04d}"}
        run = store.client.create_run(store.experiment_id, tags=tags | name)
        ids.append(str(run.info.run_id))
    rng = np.random.default_rng(0)

    def rows() -> Iterator[tuple[str, float, int, str, int, int]]:
        for run_id in ids:
            for name in names:
                for step, value in enumerate(rng.random(points).tolist(), 1):
                    yield name, value, step, run_id, step * _STEP_IMAGES, 0

    last = points * _STEP_IMAGES
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.executemany(
            "insert into metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "values (?, ?, ?, ?, ?, ?)",
            rows(),
        )
        database.execute(
            "insert into latest_metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "select key, value, timestamp, run_uuid, step, is_nan from metrics where step = ?",
            [last],
        )
        given = [(f"objective.value_{k}", str(k), run_id) for run_id in ids for k in range(60)]
        database.executemany("insert into params (key, value, run_uuid) values (?, ?, ?)", given)
        database.execute("update runs set status = 'FINISHED', end_time = start_time + 1000")
    return store, ids


def measure(folder: Path, uri: str, ids: list[str]) -> dict[str, list[float]]:
    """CPU seconds of each page: of a board that has read nothing, then four times more."""
    eight = "&".join(f"run={run_id}" for run_id in ids[:8])
    paths = {
        "runs": "/runs",
        "runs, sorted": "/runs?sort=fid1",
        "run": f"/runs/{ids[0]}",
        "run, charts": f"/runs/{ids[0]}/charts.json",
        "compare 8": f"/compare?{eight}",
        "compare 8, charts": f"/compare/charts.json?{eight}",
        "searches": "/searches",
        "registry": "/registry",
    }
    found = {}
    for name, path in paths.items():
        config = BoardConfig(storage_uri=str(folder), tracking=TrackingConfig(uri=uri))
        board = TestClient(create_app(config), "http://127.0.0.1")
        found[name] = [_seconds(board, path) for _ in range(5)]
    return found


def _seconds(board: TestClient, path: str) -> float:
    start = time.process_time()
    answer = board.get(path)
    seconds = time.process_time() - start
    assert answer.status_code == 200, answer.text
    return seconds


def main() -> int:
    """Print a table and one JSON object; 1 if a page takes too long."""
    parser = argparse.ArgumentParser("facm_dashboards.benchmark", description=__doc__)
    for name, default in (("runs", 500), ("metrics", 20), ("points", 200)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="facm-board-") as name:
        folder = Path(name)
        store, ids = write_store(folder, given.runs, given.metrics, given.points)
        before = psutil.Process().memory_info().rss
        found = measure(folder, store.uri, ids)
        after = psutil.Process().memory_info().rss
    print(f"{'page':20}{'first, s':>10}{'then, s':>10}")
    for page, seconds in found.items():
        print(f"{page:20}{seconds[0]:10.3f}{statistics.median(seconds[1:]):10.3f}")
    print(f"memory: {before / 2**20:,.0f} MiB before, {after / 2**20:,.0f} MiB after")
    slowest = max(max(seconds) for seconds in found.values())
    print(json.dumps({"slowest_seconds": slowest, "memory_mib": after / 2**20}))
    return int(slowest > MOST_SECONDS)


if __name__ == "__main__":
    raise SystemExit(main())
