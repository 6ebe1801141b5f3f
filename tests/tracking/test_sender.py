"""Metrics through outages of a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from facm_platform.tracking import MetricSender, Store, TrackingConfig, connect_store, open_run
from facm_platform.tracking.sender import Point
from tests.conftest import TrackingServer


def values(store: Store, run_id: str, key: str) -> dict[int, float]:
    return {m.step: m.value for m in store.client.get_metric_history(run_id, key)}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def run(store: Store) -> tuple[Store, str]:
    return store, open_run(store, "r", job="test", config=TrackingConfig()).run_id


def test_everything_arrives_without_waiting_for_the_store(
    run: tuple[Store, str], tmp_path: Path
) -> None:
    store, run_id = run
    sender = MetricSender(store.uri, run_id, tmp_path / "spool.jsonl")
    slowest = 0.0
    for step in range(1500):
        start = time.perf_counter()
        sender.send({"loss": step / 2, "odd": float("nan")}, images_seen=step)
        slowest = max(slowest, time.perf_counter() - start)
    assert sender.close() == 0
    assert values(store, run_id, "loss") == {step: step / 2 for step in range(1500)}
    assert len(values(store, run_id, "odd")) == 1500
    assert slowest < 1.0
    assert not (tmp_path / "spool.jsonl").exists()


def test_a_server_killed_and_started_again_in_the_middle(
    tracking_server: TrackingServer, tmp_path: Path
) -> None:
    store = connect_store(TrackingConfig(uri=tracking_server.uri), tmp_path)
    run_id = open_run(store, "r", job="test", config=TrackingConfig()).run_id
    spool = tmp_path / "spool.jsonl"
    sender = MetricSender(store.uri, run_id, spool)
    slowest = 0.0

    def send(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            start = time.perf_counter()
            sender.send({"loss": float(step)}, images_seen=step)
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.001)

    send(range(200))
    tracking_server.kill()
    send(range(200, 700))
    wait_for(spool.exists)
    tracking_server.start()
    send(range(700, 900))
    assert sender.close(timeout_seconds=60) == 0
    assert values(store, run_id, "loss") == {step: float(step) for step in range(900)}
    assert slowest < 1.0
    assert not spool.exists()


def test_undelivered_metrics_are_counted_kept_and_delivered_by_the_next_start(
    tracking_server: TrackingServer, tmp_path: Path
) -> None:
    store = connect_store(TrackingConfig(uri=tracking_server.uri), tmp_path)
    run_id = open_run(store, "r", job="test", config=TrackingConfig()).run_id
    spool = tmp_path / "spools" / "r.jsonl"
    tracking_server.kill()
    sender = MetricSender(store.uri, run_id, spool)
    for step in range(30):
        sender.send({"loss": float(step)}, images_seen=step)
    start = time.monotonic()
    assert sender.close(timeout_seconds=1.0) == 30
    assert time.monotonic() - start < 5
    assert len(spool.read_text().splitlines()) == 30

    tracking_server.start()
    again = MetricSender(store.uri, run_id, spool)
    again.send({"loss": 30.0}, images_seen=30)
    assert again.close() == 0
    assert values(store, run_id, "loss") == {step: float(step) for step in range(31)}
    assert not spool.exists()


def test_a_spool_alone_is_delivered(run: tuple[Store, str], tmp_path: Path) -> None:
    store, run_id = run
    spool = tmp_path / "spool.jsonl"
    point = Point(run_id, "loss", 2.5, 1_700_000_000_000, 64)
    spool.write_text(json.dumps(point.__dict__) + "\n")
    sender = MetricSender(store.uri, run_id, spool)
    wait_for(lambda: not spool.exists())
    assert sender.close() == 0
    assert values(store, run_id, "loss") == {64: 2.5}
