"""Requests through jobs/serve.py, from another process, while things happen to it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from facm_platform.serving.load import Body, LoadConfig, ask
from facm_platform.serving.load import prepare as prepare_load
from facm_platform.serving.plan import TOKEN_VARIABLE
from facm_platform.tracking import Store
from tests.jobs.conftest import RunJob, last_line, run_job, serving
from tests.serving.shop import MODEL, Shop, open_shop
from tests.small import ARCHITECTURE

__all__ = ["run_job"]  # a fixture of the jobs' room

TOKEN = "correct horse battery staple"
REQUESTS = int(os.environ.get("DRILL_REQUESTS", "5000"))


def job(
    shop: Shop, folder: Path, *options: str
) -> AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """A service of the shop's champion, and the job that keeps it up."""
    return serving(folder, f"model={MODEL}", f"tracking.uri={shop.store.uri}", *options)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_request_is_lost(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias moves after a third and back after two; a replica is killed after one half.

    All answers come, each the picture that the version which it names draws.
    """
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    shop = open_shop(store, tmp_path)
    first, second = shop.versions["1"], shop.versions["2"]
    drawn: Counter[str] = Counter()
    wrong: list[Body] = []
    killed: list[int] = []

    def judge(body: Body, answer: aiohttp.ClientResponse, content: bytes) -> None:
        version = answer.headers["X-Model-Version"]
        drawn[version] += 1
        if content != shop.png(version, body["class"], body["seed"]):
            wrong.append(body)

    async def reached(number: int) -> None:
        if number == REQUESTS // 3:
            shop.promote(second)
        elif number == REQUESTS // 2:
            killed.append(kill_replica(tmp_path / "serve.log"))
        elif number == 2 * REQUESTS // 3:
            shop.promote(first)

    with job(shop, tmp_path, "poll_seconds=0.5", "replicas.number=2") as (url, process):
        plan = prepare_load(LoadConfig(url=url, requests=REQUESTS, connections=48))
        load = asyncio.run(ask(plan.config, plan.subjects, judge, reached))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    print(load.metrics(1), dict(drawn), flush=True)
    assert last_line((tmp_path / "serve.log").read_text())["artifact_uri"] == url
    assert wrong == []
    assert load.statuses == {200: REQUESTS}
    assert len(load.latencies) == sum(drawn.values()) == REQUESTS
    assert set(drawn) == {"1", "2"}
    assert len(killed) == 1


# Large enough for the network to be what takes the time, as it is with real ones.
LARGE = replace(ARCHITECTURE, patch_size=8, hidden_size=512, depth=8, num_heads=8)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batching_pays(store: Store, tmp_path: Path, run_job: RunJob) -> None:
    """Three times the images of one-by-one requests at the same service, at least."""
    shop = open_shop(store, tmp_path, LARGE)
    with job(shop, tmp_path) as (url, _):

        def load(requests: int, connections: int) -> dict[str, float]:
            options = (f"url={url}", f"requests={requests}", f"connections={connections}")
            done = run_job("load", *options, "steps=4")
            assert done.returncode == 0, done.stderr
            metrics: dict[str, float] = last_line(done.stdout)["metrics"]
            print(connections, "connections:", metrics, flush=True)
            return metrics

        load(64, connections=64)
        alone, together = load(60, connections=1), load(1000, connections=64)
    assert together["status_200"] == 1000
    assert together["images_per_second"] >= 3 * alone["images_per_second"]


def kill_replica(log: Path) -> int:
    """SIGKILL to a process that draws, as the job's own output names it."""
    (pid, *_) = re.findall(r"ServeReplica:facm:model pid=(\d+)", log.read_text())
    os.kill(int(pid), signal.SIGKILL)
    return int(pid)
