"""``ray job submit`` to a cluster that has nothing of this repository installed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.jobs.conftest import ROOT, last_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A machine without this repository on its path, with the cluster's token in a private file."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    dropped = ("PYTHONPATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # As after `. .venv/bin/activate`: the job's `python` is the one with the packages.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def head(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """Address of the job server of a live head, started by ``ray start --head``."""
    port = free_port()
    arguments = [RAY, "start", "--head", "--block", "--num-cpus=4", f"--port={free_port()}"]
    arguments += [f"--dashboard-port={port}", "--dashboard-host=127.0.0.1"]
    # Its default belongs to the agent of any other Ray on this machine; jobs go through it.
    arguments += [f"--dashboard-agent-listen-port={free_port()}"]
    with (tmp_path / "head.log").open("wb") as log:
        # From an empty folder: the cluster has no other way to the code than the submission.
        process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/api/version"):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except urllib.error.HTTPError:
        return True  # it wants the token
    except (urllib.error.URLError, OSError):
        return False


def submit(
    head: str, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Submit jobs/distill.py as the README says."""
    line = [RAY, "job", "submit", "--address", head, "--working-dir", ".", "--"]
    return subprocess.run(
        [*line, "python", "jobs/distill.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_submitted_distillation(
    head: str, environment: dict[str, str], digits_uri: str, teacher_uri: str, tmp_path: Path
) -> None:
    right = [
        "--recipe=digits_distill",
        "run.name=submitted",
        f"run.storage_uri={tmp_path / 'runs'}",
        f"data.uri={digits_uri}",
        f"teacher.uri={teacher_uri}",
        "train.images=512",
    ]
    done = submit(head, environment, *right)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "distill 100%" in done.stdout
    results = [line for line in done.stdout.splitlines() if line.startswith('{"run_id"')]
    result = last_line("\n".join(results))
    assert result["run_name"] == "submitted"
    assert (Path(result["artifact_uri"]) / "model.safetensors").is_file()

    wrong = submit(head, environment, *right, "run.storage_uri=runs")
    assert wrong.returncode == 1
    assert "Give an absolute path or an s3:// address" in wrong.stdout + wrong.stderr
