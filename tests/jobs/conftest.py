"""Jobs as a user starts them: processes of their own, from any folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
RunJob = Callable[..., "subprocess.CompletedProcess[str]"]


def command(job: str, *arguments: str) -> list[str]:
    """Command line of a job."""
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]


def environment() -> dict[str, str]:
    """This process's, without a tracking server, and with a Ray of the job's own."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    # Ray takes lines of two workers that differ in numbers only for one, and keeps the second back.
    return kept | {"RAY_ADDRESS": "local", "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}


def last_line(output: str) -> dict[str, Any]:
    """The JSON object that ends a job's standard output."""
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a service that jobs/serve.py keeps up in `folder`, and the job.

    What it prints is in ``serve.log`` there.
    """
    port = free_port()
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("serve", *options, f"port={port}"),
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        deadline = time.monotonic() + 180
        while "is served at" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=120)


@pytest.fixture
def run_job(tmp_path: Path) -> RunJob:
    """``run_job("distill", "train.images=8", …)`` in a folder of the test."""

    def run(job: str, *arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(job, *arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
