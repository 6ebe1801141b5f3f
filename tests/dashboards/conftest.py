"""The gallery, a board of it in this process, and one behind a real socket."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from facm_dashboards.app import create_app
from facm_dashboards.config import BoardConfig
from facm_platform.tracking import TrackingConfig
from tests.conftest import free_port
from tests.dashboards.gallery import Gallery, write_gallery
from tests.world import World


@pytest.fixture(scope="session")
def gallery(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, world: World
) -> Gallery:
    """Written once; tests that change it have names of their own for what they add."""
    root = tmp_path_factory.mktemp("gallery")
    shutil.copy(empty_database, root / "mlflow.db")
    return write_gallery(root, world)


@pytest.fixture(scope="session")
def config(gallery: Gallery) -> BoardConfig:
    tracking = TrackingConfig(uri=gallery.store.uri)
    return BoardConfig(storage_uri=str(gallery.root), tracking=tracking)


@pytest.fixture(scope="session")
def board(config: BoardConfig) -> TestClient:
    """As its own pages ask it."""
    return client(config)


def client(config: BoardConfig, **headers: str) -> TestClient:
    base = "http://127.0.0.1:5050"
    return TestClient(
        create_app(config), base, headers={"origin": base, **headers}, follow_redirects=False
    )


@contextmanager
def served(config: BoardConfig) -> Iterator[str]:
    """The board behind a socket of loopback; its address."""
    port = free_port()
    app = create_app(config)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)
