"""``make stack``: MLflow with login on Postgres, an S3 endpoint, Ray, Prometheus and the board.

Processes on loopback, kept by supervisord. ``up`` starts what is not there and waits until all of
it answers; ``down`` ends all of it. Secrets are made once, in files of their owner's.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import psycopg2

ROOT = Path(__file__).resolve().parents[2]
SECRETS = (
    *("postgres_password", "mlflow_admin_password", "mlflow_flask_secret"),
    *("trainer_password", "ray_token", "s3_key", "grafana_password"),
)
TRAINER = "trainer"


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where each process listens."""

    postgres: int = 5433
    s3: int = 5555
    mlflow: int = 5000
    ray: int = 6379
    jobs: int = 8265
    agent: int = 52365
    prometheus: int = 9090
    board: int = 5050

    @staticmethod
    def from_environment() -> Ports:
        """The defaults, but for those that ``STACK_MLFLOW_PORT`` and the like name."""
        named = {
            name: int(os.environ[variable])
            for name in Ports.__dataclass_fields__
            if (variable := f"STACK_{name.upper()}_PORT") in os.environ
        }
        return Ports(**named)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack in a folder of its own.

    Attributes:
        folder: Of its data, logs and secrets.
        ports: Of its processes.
        cpus: That Ray may give to jobs.
    """

    folder: Path
    ports: Ports
    cpus: int = 4

    def up(self) -> None:
        """Start it, wait until it answers, and write the file to source.

        Raises:
            SystemExit: something does not answer; names it and its log.
        """
        self._prepare()
        if not self._supervisor_answers():
            self._run("supervisord")
        self._run("supervisorctl", "start", "all", codes=(0, 7))
        self._wait("postgres", self._database_answers)
        self._wait("s3", lambda: boto3_client(self).create_bucket(Bucket="facm") is not None)
        self._wait("mlflow", lambda: status(f"{self.mlflow}/health") == 200)
        self._wait("mlflow", self._make_trainer)
        self._wait("ray", lambda: status(f"http://127.0.0.1:{self.ports.jobs}/api/version") == 401)
        ready = f"http://127.0.0.1:{self.ports.prometheus}/-/ready"
        self._wait("prometheus", lambda: status(ready) == 200)
        self._wait("board", lambda: status(f"{self.board}/health") == 200)
        self._write_environment()

    def down(self) -> None:
        """End every process; data and secrets stay.

        Raises:
            SystemExit: a process is still there.
        """
        pid_file = self.folder / "supervisord.pid"
        if not self._supervisor_answers():
            return
        pid = int(pid_file.read_text())
        self._run("supervisorctl", "shutdown")
        deadline = time.monotonic() + 120
        while Path(f"/proc/{pid}").exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"error: supervisord ({pid}) has not ended; see {self.folder}/log")
            time.sleep(0.2)
        (self.folder / "env").unlink(missing_ok=True)

    @property
    def mlflow(self) -> str:
        """Address of MLflow."""
        return f"http://127.0.0.1:{self.ports.mlflow}"

    @property
    def board(self) -> str:
        """Address of the board."""
        return f"http://127.0.0.1:{self.ports.board}"

    def secret(self, name: str) -> str:
        """One of `SECRETS`."""
        return (self.folder / "secrets" / name).read_text()

    def environment(self) -> dict[str, str]:
        """What a job needs to run against this stack."""
        return {
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": TRAINER,
            "MLFLOW_TRACKING_PASSWORD": self.secret("trainer_password"),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports.s3}",
            "AWS_ACCESS_KEY_ID": TRAINER,
            "AWS_SECRET_ACCESS_KEY": self.secret("s3_key"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_ADDRESS": f"127.0.0.1:{self.ports.ray}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.ports.jobs}",
            **self._token(),
        }

    def make_secrets(self) -> None:
        """Make those that are missing, readable by us only."""
        (self.folder / "secrets").mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in SECRETS:
            file = self.folder / "secrets" / name
            if not file.exists():
                file.write_text(secrets.token_hex(24))

    def make_container_secrets(self) -> None:
        """Also what the containers of compose.yaml want.

        Their users are not ours: the files can be read by all, and the folder by us only.
        """
        self.make_secrets()
        key = {"accessKey": TRAINER, "secretKey": self.secret("s3_key")}
        rights = ["Admin", "Read", "Write", "List"]
        identity = {"name": TRAINER, "credentials": [key], "actions": rights}
        credentials = f"aws_access_key_id = {TRAINER}\naws_secret_access_key = {key['secretKey']}"
        folder = self.folder / "secrets"
        (folder / "s3_identities").write_text(json.dumps({"identities": [identity]}))
        (folder / "s3_credentials").write_text(f"[default]\n{credentials}\n")
        folder.chmod(0o700)
        for file in folder.iterdir():
            file.chmod(0o444)

    def _token(self) -> dict[str, str]:
        path = self.folder / "secrets" / "ray_token"
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}

    def _prepare(self) -> None:
        for command in ("postgres", "prometheus"):
            if command == "postgres" and postgres_folder().is_dir():
                continue
            if shutil.which(command) is None:
                raise SystemExit(f"error: no {command}; apt-get install postgresql prometheus")
        (self.folder / "log").mkdir(parents=True, exist_ok=True, mode=0o700)
        self.make_secrets()
        self._make_database()

    def _make_database(self) -> None:
        data, user = self.folder / "postgres", postgres_user()
        if (data / "PG_VERSION").exists():
            return
        # Postgres runs under a user of its own where we are root, and must find its folder.
        self.folder.chmod(0o711)
        data.mkdir(exist_ok=True, mode=0o700)
        os.chown(data, user.pw_uid, user.pw_gid)
        with tempfile.NamedTemporaryFile("w") as password:
            password.write(self.secret("postgres_password"))
            password.flush()
            os.chown(password.name, user.pw_uid, user.pw_gid)
            options = ("--username=mlflow", "--auth=scram-sha-256", f"--pwfile={password.name}")
            done = subprocess.run(
                [postgres_folder() / "initdb", "--pgdata", data, *options],
                cwd="/",
                capture_output=True,
                text=True,
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[] if os.getuid() == 0 else None,
            )
        if done.returncode:
            hint = f"\nThe user {user.pw_name} must be able to enter {data} and all above it."
            raise SystemExit(f"error: {done.stderr.strip()}{hint}")

    def _run(self, command: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> None:
        ports = {
            f"STACK_{name.upper()}_PORT": str(getattr(self.ports, name))
            for name in Ports.__dataclass_fields__
        }
        # Not those of whoever starts it: the board must not act under their login.
        own = ("MLFLOW_", "RAY_")
        inherited = {name: v for name, v in os.environ.items() if not name.startswith(own)}
        environment = inherited | ports | self._token() | {
            "STACK_FOLDER": str(self.folder),
            "STACK_ROOT": str(ROOT),
            "STACK_PYTHON": sys.executable,
            "STACK_POSTGRES": str(postgres_folder()),
            "STACK_POSTGRES_USER": postgres_user().pw_name,
            "STACK_CPUS": str(self.cpus),
            # What `run` calls are the programs of this environment, on this code.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in ("", "platform", "dashboards")),
            # MLflow's server is a client of the object store.
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports.s3}",
            "AWS_ACCESS_KEY_ID": "mlflow",
            "AWS_SECRET_ACCESS_KEY": self.secret("s3_key"),
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
        program = Path(sys.executable).parent / command
        settings = str(Path(__file__).with_name("supervisord.conf"))
        done = subprocess.run(
            [program, "--configuration", settings, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode not in codes:
            raise SystemExit(f"error: {command}: {done.stdout}{done.stderr}")

    def _supervisor_answers(self) -> bool:
        file = self.folder / "supervisord.pid"
        if not file.exists():
            return False
        process = Path(f"/proc/{file.read_text().strip()}/cmdline")
        return process.exists() and b"supervisord" in process.read_bytes()

    def _wait(self, program: str, answers: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if answers():
                    return
                reason = "it answers otherwise than expected"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                log = self.folder / "log" / f"{program}.log"
                raise SystemExit(f"error: {program} does not serve ({reason}); see {log}")
            time.sleep(0.5)

    def _database_answers(self) -> bool:
        psycopg2.connect(
            host="127.0.0.1",
            port=self.ports.postgres,
            user="mlflow",
            dbname="postgres",
            password=self.secret("postgres_password"),
        ).close()
        return True

    def _make_trainer(self) -> bool:
        """The user of the jobs, with no right to what others made."""
        body = {"username": TRAINER, "password": self.secret("trainer_password")}
        login = ("admin", self.secret("mlflow_admin_password"))
        # 400: it is there already.
        return status(f"{self.mlflow}/api/2.0/mlflow/users/create", body, login) in (200, 400)

    def _write_environment(self) -> None:
        lines = [f"export {name}='{value}'" for name, value in self.environment().items()]
        (self.folder / "env").write_text("\n".join(lines) + "\n")


def status(url: str, body: object = None, login: tuple[str, str] | None = None) -> int:
    """HTTP status of a GET, or of a POST of `body`."""
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    if login is not None:
        request.add_header("Authorization", f"Basic {b64encode(':'.join(login).encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def boto3_client(stack: Stack) -> object:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{stack.ports.s3}",
        aws_access_key_id=TRAINER,
        aws_secret_access_key=stack.secret("s3_key"),
        region_name="us-east-1",
    )


def postgres_folder() -> Path:
    """Of Postgres's programs: on the path, or where Debian puts them."""
    found = shutil.which("postgres")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/nonexistent"))


def postgres_user() -> pwd.struct_passwd:
    """Us; for root, Debian's user of Postgres."""
    return pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())


def main() -> None:
    """``stack.py up|down|secrets``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["up", "down", "secrets"])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "stack")
    given = parser.parse_args()
    # What lies around it is not ours alone: Postgres's user must pass, where we are root.
    given.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    os.umask(0o077)
    stack = Stack(folder=given.folder.absolute(), ports=Ports.from_environment())
    if given.what == "down":
        stack.down()
        return
    if given.what == "secrets":
        stack.make_container_secrets()
        return
    stack.up()
    print(
        f"MLflow      {stack.mlflow}\n"
        f"            login: admin, {stack.folder}/secrets/mlflow_admin_password\n"
        f"board       {stack.board}\n"
        f"Prometheus  http://127.0.0.1:{stack.ports.prometheus}\n"
        f"to use it   . {os.path.relpath(stack.folder)}/env && make quickstart\n"
        f"to end it   make stack-stop"
    )


if __name__ == "__main__":
    main()
