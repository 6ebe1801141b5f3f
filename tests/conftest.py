"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from facm_platform.latents import LatentManifest
from facm_platform.tracking import Store, TrackingConfig, connect_store
from tests.faulty_s3 import FaultyS3, random_faults
from tests.small import artifact_config, write_digits, write_model
from tests.world import World, write_world

# Ray Train asks the dashboard whether a run's controller lives, at the address a cluster would have
# served it at; there another cluster's would answer that it knows of no such run, which ends it.
# On port 1 nothing answers, which Ray takes for an outage.
NO_DASHBOARD = {"include_dashboard": False, "dashboard_port": 1}


class TrackingServer:
    """A real MLflow server on a SQLite file, on loopback, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            # A session of its own, so that its workers end with it.
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 180
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: making them takes five seconds each time."""
    folder = tmp_path_factory.mktemp("mlflow")
    connect_store(TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}"), folder)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    """An embedded tracking store under ``tmp_path / "runs"``, as the jobs would make it."""
    root = tmp_path / "runs"
    root.mkdir()
    shutil.copy(empty_database, root / "mlflow.db")
    return connect_store(TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}"), root)


@pytest.fixture
def tracking_server(tmp_path: Path, empty_database: Path) -> Iterator[TrackingServer]:
    """An MLflow server that answers; `kill` and `start` it at will."""
    server = TrackingServer(tmp_path / "server")
    server.folder.mkdir()
    shutil.copy(empty_database, server.folder / "server.db")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real S3 endpoint over HTTP, in a process of its own, named by the standard environment."""
    folder = tmp_path_factory.mktemp("s3")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not answers_on(port):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((folder / "moto.log").read_text()[-2000:])
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            environment.setenv("AWS_ACCESS_KEY_ID", "test")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
            yield
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers_on(port: int) -> bool:
    """Whether something listens on that loopback port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def bucket(object_store: None) -> str:
    """The address of a new, empty bucket: ``s3://...``."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def faulty_s3(
    object_store: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FaultyS3]]:
    """Put an endpoint that fails before the object store: ``faulty_s3("503")`` or ``("cut")``.

    The environment names it from then on, for this process and those that it starts.
    """
    proxies: list[FaultyS3] = []

    def start(mode: str, *, rate: float = 0.1, seed: int = 0) -> FaultyS3:
        faults = random_faults(mode, rate, seed)
        proxies.append(FaultyS3(os.environ["AWS_ENDPOINT_URL"], faults))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].url)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.stop()
        assert proxy.errors == []


@pytest.fixture(scope="session")
def ray_cluster(object_store: None) -> Iterator[None]:
    """One small Ray cluster for all tests that need none of their own."""
    import ray

    import facm_core
    import facm_platform

    packages = [str(Path(package.__path__[0])) for package in (facm_core, facm_platform)]
    ray.init(
        address="local",
        num_cpus=4,
        **NO_DASHBOARD,
        logging_level="warning",
        runtime_env={"py_modules": packages},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def digits_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits as a latent set."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_uri(tmp_path_factory: pytest.TempPathFactory, digits_uri: str) -> str:
    """A teacher of the digits with random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder, artifact_config(LatentManifest.load(digits_uri)))
    return str(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Digits, features, a teacher and its student."""
    return write_world(tmp_path_factory.mktemp("world"))
