"""Jobs as a user starts them: processes of their own, from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
