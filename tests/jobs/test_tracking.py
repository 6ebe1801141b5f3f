"""A run whose tracking server goes away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import TrackingServer
from tests.jobs.conftest import last_line
from tests.jobs.driver import Driver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BATCH, LOG = 8, 400
# Of training: the outage, and some before and after it.
SECONDS = 150


def test_a_minute_without_the_tracking_server(
    tracking_server: TrackingServer, tmp_path: Path, digits_uri: str, teacher_uri: str
) -> None:
    """Training goes on meanwhile, and every metric is there afterwards."""
    arguments = [
        "run.name=outage",
        f"run.storage_uri={tmp_path / 'runs'}",
        f"run.tracking.uri={tracking_server.uri}",
        f"data.uri={digits_uri}",
        f"teacher.uri={teacher_uri}",
        "train.images=400000",
        f"train.max_hours={SECONDS / 3600}",
        f"train.global_batch_size={BATCH}",
        f"train.log_images={LOG}",
        "workers.max=1",
    ]
    driver = Driver(arguments, "local", tmp_path)
    try:
        driver.wait_until(lambda: driver.images_seen >= 5 * LOG)
        tracking_server.kill()
        before = driver.images_seen
        time.sleep(60)
        during = driver.images_seen - before
        assert driver.process.poll() is None, driver.output
        tracking_server.start()
        driver.finish()
    finally:
        driver.process.kill()
    print(f"{during} images while the server was away")
    assert during >= 5 * LOG
    assert "tracking is away" in driver.output
    assert "tracking is back" in driver.output

    client = MlflowClient(tracking_server.uri)
    run = client.get_run(last_line(driver.output)["run_id"])
    assert run.info.status == "FINISHED"
    last = LOG * (driver.images_seen // LOG)
    for metric in ("loss", "images_per_second", "gradient_norm"):
        history = client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in history] == list(range(LOG, last + 1, LOG))
