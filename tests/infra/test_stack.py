"""`make stack`: real processes, used by a real job, shut to strangers, and gone at the end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg2
import pytest
from botocore.config import Config

from tests.conftest import free_port
from tests.infra.stack import Ports, Stack, status
from tests.jobs.conftest import ROOT, last_line

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1600),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and list(Path("/usr/lib/postgresql").glob("*/bin"))),
        reason="no Prometheus or no Postgres here (Debian: prometheus, postgresql)",
    ),
]


@pytest.fixture(scope="module")
def stack() -> Iterator[Any]:
    """It runs; afterwards none of its processes is left."""
    # Not under pytest's folder, which Postgres's user must not enter.
    folder = Path(tempfile.mkdtemp(prefix="facm-stack-", dir="/tmp"))
    ports = Ports(**{name: free_port() for name in Ports.__dataclass_fields__})
    stack = Stack(folder=folder, ports=ports)
    previous = os.umask(0o077)
    before = processes()
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
        os.umask(previous)
        shutil.rmtree(folder)
    assert not [p for p in processes() - before if str(folder) in command(p)]
    left = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    assert not left & set(vars(ports).values())


def processes() -> set[psutil.Process]:
    return set(psutil.process_iter())


def command(process: psutil.Process) -> str:
    try:
        return " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.Error:
        return ""


def environment(stack: Any) -> dict[str, str]:
    """As after `. runs/stack/env`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    return clean | stack.environment()


def test_everything_listens_on_loopback_only(stack: Any) -> None:
    # Ray's own ports listen everywhere: token, and a firewall, are what protects them.
    ours = {port for name, port in vars(stack.ports).items() if name not in ("ray", "agent")}
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
    found = {(a.ip, a.port) for a in listening if a.port in ours}
    assert found == {("127.0.0.1", port) for port in ours}


def test_strangers_are_refused(stack: Any) -> None:
    search = f"{stack.mlflow}/api/2.0/mlflow/experiments/search"
    jobs = f"http://127.0.0.1:{stack.ports.jobs}/api/jobs/"
    assert status(search, {"max_results": 1}) == 401
    assert status(search, {"max_results": 1}, ("trainer", "wrong")) == 401
    assert status(search, {"max_results": 1}, ("trainer", stack.secret("trainer_password"))) == 200
    assert status(jobs) == 401
    assert status(jobs, {"entrypoint": "id"}) == 401
    promote = f"{stack.board}/models/digits-facm/1/promote"
    assert status(promote, {}) in (401, 403)
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(
            host="127.0.0.1", port=stack.ports.postgres, user="mlflow", dbname="postgres",
            password="wrong",
        )  # fmt: skip


def test_mlflow_refuses_foreign_hosts(stack: Any) -> None:
    login = ("trainer", stack.secret("trainer_password"))
    foreign = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}"]
    foreign += ["--header", "Host: evil.example", "--user", ":".join(login)]
    done = subprocess.run([*foreign, f"{stack.mlflow}/"], capture_output=True, text=True)
    assert done.stdout == "403"


def test_a_user_sees_nothing_of_others(stack: Any) -> None:
    admin = ("admin", stack.secret("mlflow_admin_password"))
    body = {"name": "of-the-admin"}
    assert status(f"{stack.mlflow}/api/2.0/mlflow/experiments/create", body, admin) == 200
    asked = f"{stack.mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name=of-the-admin"
    assert status(asked, None, admin) == 200
    assert status(asked, None, ("trainer", stack.secret("trainer_password"))) == 403


def test_secrets_are_in_files_of_ours_and_nowhere_else(stack: Any) -> None:
    secrets = {file.name: file.read_text() for file in (stack.folder / "secrets").iterdir()}
    for name in secrets:
        assert (stack.folder / "secrets" / name).stat().st_mode & 0o077 == 0, name
    assert (stack.folder / "env").stat().st_mode & 0o077 == 0
    logs = "".join(f.read_text(errors="replace") for f in (stack.folder / "log").iterdir())
    lines = [" ".join(p.cmdline()) for p in processes() if p.is_running()]
    for name, secret in secrets.items():
        assert secret not in logs, name
        assert not any(secret in line for line in lines), name


def test_the_quickstart_runs_on_it(stack: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "quickstart.py")],
        cwd=tmp_path,
        env=environment(stack),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    result = last_line(done.stdout)
    # Runs and models are in Postgres, files in the object store.
    with psycopg2.connect(
        host="127.0.0.1", port=stack.ports.postgres, user="mlflow", dbname="postgres",
        password=stack.secret("postgres_password"),
    ) as database, database.cursor() as cursor:  # fmt: skip
        cursor.execute("select status from runs where run_uuid = %s", (result["run_id"],))
        assert cursor.fetchone() == ("FINISHED",)
        cursor.execute("select count(*) from model_versions where name = 'digits-facm'")
        assert cursor.fetchone() == (1,)
    s3 = boto3.client(
        "s3",
        endpoint_url=stack.environment()["AWS_ENDPOINT_URL"],
        aws_access_key_id="trainer",
        aws_secret_access_key=stack.secret("s3_key"),
        config=Config(region_name="us-east-1"),
    )
    stored = {item["Key"] for item in s3.list_objects_v2(Bucket="facm")["Contents"]}
    assert any(key.endswith("model.safetensors") for key in stored), stored


def test_up_again_changes_nothing(stack: Any) -> None:
    before = (stack.folder / "supervisord.pid").read_text()
    stack.up()
    assert (stack.folder / "supervisord.pid").read_text() == before
