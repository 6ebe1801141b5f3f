"""`make stack`: real processes, used by a real job, shut to strangers, and gone at the end."""

from __future__ import annotations

import os
import re
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
from moto.iam.access_control import IAMPolicy, PermissionResult
from omegaconf import OmegaConf

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


SHORT: dict[str, dict[str, Any]] = {
    "encode": {},
    "features": {},
    "pretrain": {"train": {"images": 5120, "checkpoint_images": 2560, "log_images": 1280}},
    "distill": {"train": {"images": 5120, "checkpoint_images": 2560, "log_images": 1280}},
    "evaluate": {"samples": 200},
}
"""The quickstart's recipes, changed to take a minute."""


def write_recipes(folder: Path) -> Path:
    """Short ones, with all files in the stack's object store; their prefix."""
    for step, changes in SHORT.items():
        recipe = OmegaConf.load(ROOT / "jobs" / "recipes" / f"digits_{step}.yaml")
        recipe = OmegaConf.merge(recipe, changes, {"run": {"storage_uri": "s3://facm/runs"}})
        text = OmegaConf.to_yaml(recipe).replace("uri: runs/", "uri: s3://facm/runs/")
        (folder / f"short_{step}.yaml").write_text(text)
    return folder / "short"


def test_the_quickstart_runs_on_it(stack: Any, tmp_path: Path) -> None:
    """All of its steps, shortened; what `make quickstart` does at length."""
    recipes = write_recipes(tmp_path)
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "quickstart.py"), f"recipes={recipes}"],
        cwd=tmp_path,
        env=environment(stack),
        capture_output=True,
        text=True,
        timeout=840,
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
        # Metrics come from workers, which need the login as well.
        cursor.execute(
            "select count(*) from metrics join runs using (run_uuid) "
            "where runs.name = 'digits-student' and key = 'loss'"
        )
        assert cursor.fetchone() == (4,)
    s3 = boto3.client(
        "s3",
        endpoint_url=stack.environment()["AWS_ENDPOINT_URL"],
        aws_access_key_id="trainer",
        aws_secret_access_key=stack.secret("s3_key"),
        config=Config(region_name="us-east-1"),
    )
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="facm")
    stored = {item["Key"] for page in pages for item in page["Contents"]}
    assert "runs/latents/digits/manifest.json" in stored
    assert "runs/digits-student/artifact/model.safetensors" in stored
    assert any(key.startswith("mlflow/") for key in stored)
    assert not (tmp_path / "runs").exists()


def test_a_worker_on_aws_may_do_what_was_done_to_the_store(stack: Any) -> None:
    """The requests that the object store has seen, against the policy of the workers' role."""
    text = (ROOT / "infra/aws/modules/access/training.json").read_text()
    policy = IAMPolicy(text.replace("${bucket_arn}", "arn:aws:s3:::facm"))
    log = (stack.folder / "log" / "s3.log").read_text()
    seen = {needed(*match) for match in re.findall(r'"([A-Z]+) /facm(/[^? ]*)?(\?\S*)? HTTP', log)}
    seen.discard(("s3:CreateBucket", "arn:aws:s3:::facm"))  # by the stack itself
    assert {"s3:GetObject", "s3:PutObject", "s3:ListBucket"} <= {action for action, _ in seen}
    for action, resource in seen:
        verdict = policy.is_action_permitted(action, resource=resource)
        assert verdict == PermissionResult.PERMITTED, (action, resource)


def needed(method: str, key: str, query: str) -> tuple[str, str]:
    """The permission that a request to S3 needs, and on what."""
    bucket = "arn:aws:s3:::facm"
    if key in ("", "/"):
        names = {"GET": "ListBucket", "HEAD": "ListBucket", "PUT": "CreateBucket"}
        # Deletion of several: one permission for each.
        deletes = method == "POST" and "delete" in query
        return ("s3:DeleteObject", f"{bucket}/any") if deletes else (f"s3:{names[method]}", bucket)
    if method == "DELETE":
        return (
            "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
        ), bucket + key
    names = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject"}
    return f"s3:{names[method]}", bucket + key


def test_up_again_changes_nothing(stack: Any) -> None:
    before = (stack.folder / "supervisord.pid").read_text()
    stack.up()
    assert (stack.folder / "supervisord.pid").read_text() == before
