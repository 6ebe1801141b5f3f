"""The image, as far as a file can tell, and its entry point; no container is built here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "infra" / "docker"
RUN = DOCKER / "run"


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def test_the_base_is_pinned_by_digest() -> None:
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert re.search(r"@sha256:[0-9a-f]{64}$", bases[0])
    assert set(bases[1:]) == {"base"}


def test_it_runs_as_nobody_in_particular_and_tells_its_health() -> None:
    found = dict(instructions())
    assert found["USER"] == "10001:10001"
    assert "/app/infra/docker/healthy" in found["HEALTHCHECK"]
    assert found["ENTRYPOINT"] == '["/app/infra/docker/run"]'
    assert all(os.access(DOCKER / name, os.X_OK) for name in ("run", "healthy"))


def test_packages_are_those_of_the_lock_with_their_hashes() -> None:
    installs = [rest for name, rest in instructions() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 1
    assert "--require-hashes --no-deps -r /tmp/requirements.lock" in installs[0]


def test_only_what_runs_is_copied() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = {rule[1:] for rule in rules if rule.startswith("!")}
    assert copied == {
        *("requirements.lock", "facm_core", "platform", "dashboards", "jobs", "infra/docker"),
    }


@pytest.mark.parametrize(
    ("role", "environment", "said"),
    [
        ("ray-node", {}, "no Ray token"),
        ("mlflow", {}, "MLFLOW_BACKEND_STORE_URI"),
        (
            "mlflow",
            {"MLFLOW_BACKEND_STORE_URI": "x", "MLFLOW_ARTIFACTS_DESTINATION": "x"},
            "MLFLOW_SERVER_ALLOWED_HOSTS",
        ),
        (
            "mlflow",
            {
                "MLFLOW_BACKEND_STORE_URI": "x",
                "MLFLOW_ARTIFACTS_DESTINATION": "x",
                "MLFLOW_SERVER_ALLOWED_HOSTS": "x",
            },
            "MLFLOW_AUTH_ADMIN_PASSWORD",
        ),
        ("server", {}, "no role 'server'"),
    ],
)
def test_a_role_does_not_start_without_what_makes_it_safe(
    role: str, environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    # Nothing on the path but the shell's own: were it to start, it would not be found.
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | environment
    done = subprocess.run([RUN, role], env=clean, capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert said in done.stderr


def test_mlflow_reads_its_secrets_from_files(tmp_path: Path) -> None:
    """With a program in MLflow's place that tells how it was started."""
    secrets = {name: f"of-{name}" for name in ("postgres_password", "mlflow_admin_password")}
    secrets["mlflow_flask_secret"] = "of-flask"
    for name, value in secrets.items():
        (tmp_path / name).write_text(value)
    spy = tmp_path / "mlflow"
    spy.write_text('#!/bin/sh\necho "argv $*"\nenv\ncat "$MLFLOW_AUTH_CONFIG_PATH"\n')
    spy.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SECRETS": str(tmp_path),
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2://mlflow@db/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://facm/mlflow",
        "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.com",
    }
    done = subprocess.run([RUN, "mlflow"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    argv = next(line for line in done.stdout.splitlines() if line.startswith("argv"))
    assert not any(value in argv for value in secrets.values())
    assert "--app-name basic-auth" in argv
    assert "--allowed-hosts mlflow.example.com" in argv
    lines = done.stdout.splitlines()
    assert "PGPASSWORD=of-postgres_password" in lines
    assert "MLFLOW_AUTH_ADMIN_PASSWORD=of-mlflow_admin_password" in lines
    assert "MLFLOW_FLASK_SERVER_SECRET_KEY=of-flask" in lines
    assert "default_permission = NO_PERMISSIONS" in lines
