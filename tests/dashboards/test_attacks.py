"""Whatever a strange page, a strange name or a viewer sends is refused, with the right status."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import requests
from starlette.testclient import TestClient

from facm_core.errors import InvalidInputError
from facm_dashboards.__main__ import main
from facm_dashboards.config import BoardConfig, check_bind
from facm_dashboards.identity import Visitor, forward_logins, visitor
from facm_platform.registry.versions import CHAMPION, find_version
from facm_platform.tracking import TrackingConfig, connect_store, new_client
from facm_platform.tracking.reading import read_artifact
from tests.conftest import answers_on, free_port
from tests.dashboards.conftest import client
from tests.dashboards.gallery import HOSTILE, MODEL, Gallery

PROMOTE = f"/registry/{MODEL}/1/promote"


def champion(gallery: Gallery) -> str | None:
    found = find_version(gallery.store.client, MODEL, CHAMPION)
    return None if found is None else found.number


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:5051"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-type": "application/json"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
    ],
)
def test_a_strange_page_promotes_nothing(
    board: TestClient, gallery: Gallery, headers: dict[str, str], status: int
) -> None:
    before = champion(gallery)
    answer = board.post(PROMOTE, content=b"nfe=1", headers=FORM | headers)
    assert answer.status_code == status
    assert champion(gallery) == before


FORM = {"content-type": "application/x-www-form-urlencoded"}


def test_a_strange_name_is_a_rebinding(board: TestClient) -> None:
    for host in ("evil.example", "evil.example:5050", "127.0.0.1.evil.example", "", "[::1", "a b"):
        assert board.get("/runs", headers={"host": host}).status_code == 400, host
    for host in ("127.0.0.1:5050", "localhost:1", "[::1]:5050"):
        assert board.get("/health", headers={"host": host}).status_code == 200, host


def test_every_answer_carries_the_policy(board: TestClient) -> None:
    for path in ("/runs", "/static/board.css", "/nowhere", "/health"):
        headers = board.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["referrer-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
    refused = board.get("/runs", headers={"host": "evil.example"}).headers
    assert "default-src 'none'" in refused["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    [
        "../../../mlflow.db",
        "samples/../../../../mlflow.db",
        "/etc/passwd",
        "samples/..%2f..%2fmlflow.db",
        "config.yaml",
        "model/model.safetensors",
        "samples/none.png",
        "samples",
        "..",
        "file:///etc/passwd.png",
        "a\x00.png",
    ],
)
def test_no_name_reaches_a_file(board: TestClient, gallery: Gallery, name: str) -> None:
    run = gallery.runs["strong-anchor"]
    answer = board.get(f"/runs/{run}/picture", params={"name": name})
    assert answer.status_code == 404, answer.text[:300]
    assert b"SQLite" not in answer.content


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/runs/..%2f..%2fetc",
        "/registry/..%2f..",
        "/registry/%2e%2e",
        "/registry/digits/..%2f1",
        "/registry/digits/99",
        "/runs/" + "0" * 32,
        "/searches/" + "0" * 32,
    ],
)
def test_no_path_reaches_a_file(board: TestClient, path: str) -> None:
    assert board.get(path).status_code in (404, 422)


def test_a_picture_is_one(board: TestClient, gallery: Gallery) -> None:
    """Named like one is not enough."""
    run = gallery.runs["hostile"]
    gallery.store.client.log_text(run, "<script>alert(1)</script>", "samples/fake.png")
    answer = board.get(f"/runs/{run}/picture", params={"name": "samples/fake.png"})
    assert answer.status_code == 404


def inline(text: str) -> list[str]:
    """Scripts, styles and handlers that stand in a page itself."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = [name for name, _ in attrs]
            found.extend(name for name in names if name == "style" or name.startswith("on"))
            if tag == "style" or (tag == "script" and "src" not in names):
                found.append(tag)

    Reader().feed(text)
    return found


def test_names_and_tags_are_text(board: TestClient, gallery: Gallery) -> None:
    pages = ["/runs", f"/runs/{gallery.runs['hostile']}", f"/registry/{MODEL}/2"]
    pages += [f"/compare?run={gallery.runs['hostile']}", "/runs?q=" + "<script>alert(3)</script>"]
    for page in pages:
        text = board.get(page).text
        assert "&lt;script&gt;" in text, page
        assert "<script>" not in text, page
        assert "<img src=x" not in text, page
        assert inline(text) == [], page
    assert HOSTILE in [
        run["series"][0]["name"]
        for run in board.get(f"/compare/charts.json?run={gallery.runs['hostile']}").json()
        if run["key"] == "loss"
    ]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/runs?q=" + "a" * 201, 422),
        ("/runs?q=" + "a" * 5000, 414),
        ("/runs?sort=nothing", 404),
        ("/runs?sort='; drop table", 422),
        ("/runs?page=0", 422),
        ("/runs?page=99999999999999999999", 422),
        ("/runs/xyz", 422),
        ("/compare?" + "&".join(f"run={k:032x}" for k in range(9)), 400),
        ("/compare?" + "&".join("run=a" for _ in range(65)), 422),
        (f"/registry/{MODEL}/{'9' * 30}", 422),
        (f"/registry/{MODEL}/1?nfe=0", 422),
        ("/registry/" + "m" * 300, 422),
    ],
)
def test_what_is_too_much_is_refused(board: TestClient, path: str, status: int) -> None:
    assert board.get(path).status_code == status


def test_forms_are_bounded(board: TestClient, gallery: Gallery) -> None:
    before = champion(gallery)
    for content, status in (
        (b"reason=" + b"a" * 9000, 413),
        (b"reason=" + b"a" * 600, 422),
        (b"&".join(b"a=1" for _ in range(20)), 422),
        (b"nfe=x", 422),
        (b"nfe=-1", 422),
        (b"nfe=\xff", 422),
    ):
        assert board.post(PROMOTE, content=content, headers=FORM).status_code == status, content
    assert board.post(PROMOTE, content=iter([b"nfe=1"]), headers=FORM).status_code == 411
    assert board.put("/runs", content=b"").status_code == 405
    assert champion(gallery) == before


def test_strangers_are_not_let_in(
    config: BoardConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither beyond loopback without a login, nor under the board's own."""
    with pytest.raises(InvalidInputError, match="asks nobody who they are"):
        check_bind(replace(config, host="0.0.0.0"))
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InvalidInputError, match="does not answer"):
        check_bind(replace(config, host="10.0.0.1", tracking=away))
    with pytest.raises(InvalidInputError, match="under its login"):
        check_bind(replace(config, tracking=TrackingConfig(uri="http://me:secret@localhost:1")))
    assert main(["--host", "0.0.0.0", "--tracking-uri", config.tracking_uri]) == 2
    assert "SSH tunnel" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    with pytest.raises(InvalidInputError, match="their own"):
        check_bind(config)


class LoginServer:
    """A real MLflow server that asks who one is: an admin, a promoter and a viewer."""

    ADMIN = ("admin", "admin-password-1")
    VIEWER = ("vera", "viewer-password-1")
    PROMOTER = ("paul", "promoter-password-1")

    def __init__(self, folder: Path, gallery: Gallery) -> None:
        self.uri = f"http://127.0.0.1:{(port := free_port())}"
        settings = folder / "auth.ini"
        settings.write_text(
            "[mlflow]\ndefault_permission = READ\n"
            f"database_uri = sqlite:///{folder / 'auth.db'}\n"
            f"admin_username = {self.ADMIN[0]}\nadmin_password = {self.ADMIN[1]}\n"
            # Or every request costs the server a slow hash of the password.
            "auth_cache_ttl_seconds = 60\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--workers", "1", "--app-name", "basic-auth"]
        command += ["--backend-store-uri", gallery.store.uri]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        self._log = (folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._port = port

    def __enter__(self) -> LoginServer:
        deadline = time.monotonic() + 180
        while not answers_on(self._port):
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while requests.get(f"{self.uri}/health", timeout=30).status_code != 200:
            time.sleep(0.2)
        for name, password in (self.VIEWER, self.PROMOTER):
            self._ask("2.0/mlflow/users/create", username=name, password=password)
        self._ask(
            "3.0/mlflow/users/permissions/grant",
            username=self.PROMOTER[0],
            resource_type="registered_model",
            resource_id=MODEL,
            permission="EDIT",
        )
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, 9)
        self._process.wait()
        self._log.close()

    def _ask(self, path: str, **given: str) -> None:
        answer = requests.post(f"{self.uri}/api/{path}", json=given, auth=self.ADMIN, timeout=30)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory, gallery: Gallery) -> Gallery:
    """A copy of the gallery, in which promotions may happen."""
    root = tmp_path_factory.mktemp("logins") / "runs"
    shutil.copytree(gallery.root, root)
    tracking = TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}")
    return Gallery(root, connect_store(tracking, root), gallery.runs)


@pytest.fixture(scope="module")
def login_server(
    tmp_path_factory: pytest.TempPathFactory, copied: Gallery
) -> Iterator[LoginServer]:
    pytest.importorskip("flask_wtf", reason="MLflow's logins need mlflow[auth]")
    with LoginServer(tmp_path_factory.mktemp("auth"), copied) as server:
        yield server


def test_files_come_through_the_server_under_the_visitors_login(
    login_server: LoginServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the server, and nobody else, reaches the store of artifacts."""
    client = new_client(login_server.uri)
    with monkeypatch.context() as patch:
        for name, value in zip(("USERNAME", "PASSWORD"), login_server.ADMIN, strict=True):
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)
        experiment = client.create_experiment("proxied", "mlflow-artifacts:/proxied")
        run_id = client.create_run(experiment).info.run_id
        client.log_text(run_id, "a card", "model/README.md")
    login = base64.b64encode(":".join(login_server.VIEWER).encode()).decode()
    forward_logins()
    token = visitor.set(Visitor(f"Basic {login}"))
    try:
        assert read_artifact(client, run_id, "model/README.md") == b"a card"
    finally:
        visitor.reset(token)


def test_viewers_look_and_promoters_promote(
    login_server: LoginServer, config: BoardConfig, copied: Gallery
) -> None:
    behind = replace(
        config, storage_uri=str(copied.root), tracking=TrackingConfig(uri=login_server.uri)
    )
    check_bind(replace(behind, host="0.0.0.0"))
    board = client(behind)
    asked = board.get("/runs")
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic")
    viewer, promoter = login_server.VIEWER, login_server.PROMOTER
    assert board.get("/runs", auth=(viewer[0], "wrong")).status_code == 401
    assert "strong-anchor" in board.get("/runs", auth=viewer).text
    # What was read for one is not shown to another, who is nobody.
    assert board.get("/runs").status_code == 401
    assert board.get("/runs/rows").status_code == 401
    run = copied.runs["strong-anchor"]
    charts = {one["key"]: one for one in board.get(f"/runs/{run}/charts.json", auth=viewer).json()}
    assert len(charts["losses"]["series"][0]["points"]) == 12

    page = f"/registry/{MODEL}/1"
    before = champion(copied)
    assert "ask for MLflow" in board.get(page, auth=viewer).text
    refused = board.post(PROMOTE, content=b"nfe=1", headers=FORM, auth=viewer)
    assert refused.status_code == 403
    assert board.post(PROMOTE, content=b"nfe=1", headers=FORM).status_code == 401
    assert champion(copied) == before
    assert not (copied.root / "promotions").exists() or before is not None

    copied.register(1.0)
    number = copied.store.client.get_model_version_by_alias(MODEL, "challenger").version
    address = f"/registry/{MODEL}/{number}/promote"
    for known in (promoter, login_server.ADMIN):
        assert "Promote to champion" in board.get(address.rpartition("/")[0], auth=known).text
    done = board.post(address, content=b"nfe=1&reason=better", headers=FORM, auth=promoter)
    assert done.status_code == 303, done.text
    assert champion(copied) == str(number)
    tags = copied.store.client.get_model_version(MODEL, number).tags
    assert tags["facm.promoted_by"] == "paul"
    assert tags["facm.promoted_because"].startswith("better; promote digits version")
