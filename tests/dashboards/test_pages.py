"""What the pages tell, against what the store holds; and what they say when there is nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from facm_dashboards import data as data_module
from facm_dashboards.config import BoardConfig
from facm_dashboards.runs import silent_seconds
from facm_platform.registry.versions import CHAMPION, find_version
from facm_platform.tracking import TrackingConfig, connect_store, new_client, open_run
from facm_platform.tracking.reading import read_curves, read_runs
from tests.conftest import TrackingServer, free_port
from tests.dashboards.conftest import client
from tests.dashboards.gallery import MODEL, Gallery

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
FORM = {"content-type": "application/x-www-form-urlencoded"}


def chart(board: TestClient, path: str, key: str) -> dict[str, list[list[float]]]:
    """Points of a chart's series, by name."""
    found = {one["key"]: one for one in board.get(path).json()}[key]
    return {series["name"]: series["points"] for series in found["series"]}


def test_a_run_is_told_as_the_store_has_it(board: TestClient, gallery: Gallery) -> None:
    run, store = gallery.runs["strong-anchor"], gallery.store.client
    told = chart(board, f"/runs/{run}/charts.json", "losses")
    kept = store.get_metric_history(run, "loss_fm")
    assert told["FM (anchor)"] == [[p.step, p.value] for p in kept]
    fids = chart(board, f"/runs/{run}/charts.json", "fid")
    assert [point[0] for point in fids["1 step"]] == [48, 96]
    last = store.get_run(run).data.metrics
    assert fids["2 steps"][-1] == [96, last["fid_nfe2"], last["fid_nfe2_error"]]
    heat = chart(board, f"/runs/{run}/charts.json", "loss_cm-by-time")["loss_cm"]
    cells = {(column, row): value for column, row, value in heat}
    for row in range(8):
        for point in store.get_metric_history(run, f"loss_cm/t{row}"):
            assert cells[point.step // 8 - 1, row] == point.value
    page = board.get(f"/runs/{run}").text
    assert f"{last['fid_nfe1']:.2f} ± {last['fid_nfe1_error']:.2f}" in page
    assert page.count('class="tag">best<') == 1


def test_samples_of_every_checkpoint_beside_the_teacher(
    board: TestClient, gallery: Gallery
) -> None:
    run = gallery.runs["strong-anchor"]
    page = board.get(f"/runs/{run}").text
    found = re.findall(r'data-steps="(\d)" data-images="(\d+)" data-href="([^"]+)"', page)
    assert [(int(s), int(i)) for s, i, _ in found] == [(1, 48), (1, 96), (2, 48), (2, 96)]
    pictures = {board.get(href).content for _, _, href in found}
    assert len(pictures) == 4
    assert all(content.startswith(b"\x89PNG") for content in pictures)
    teacher = re.search(r'from the same noise" src="([^"]+teacher_nfe2.png)"', page)
    assert teacher
    assert board.get(teacher[1]).headers["content-type"] == "image/png"


def test_runs_are_filtered_sorted_and_compared(board: TestClient, gallery: Gallery) -> None:
    def names(query: str) -> list[str]:
        rows = board.get(f"/runs/rows?{query}").text
        return re.findall(r'<th scope="row"><a href="[^"]+">([^<]+)</a>', rows)

    assert names("q=anchor weak") == ["weak-anchor"]
    assert set(names("job=search")) == {"s"}
    assert names("q=nothing-like-that") == []
    assert "Show all" in board.get("/runs?q=nothing-like-that").text
    known = gallery.store.client
    by_fid = sorted(
        ("strong-anchor", "weak-anchor"),
        key=lambda name: known.get_run(gallery.runs[name]).data.metrics["fid_nfe1"],
    )
    assert names("q=-anchor&sort=fid1") == by_fid
    ids = [gallery.runs[name] for name in ("strong-anchor", "weak-anchor")]
    path = f"/compare/charts.json?run={ids[0]}&run={ids[1]}"
    steps = chart(board, path, "fid-nfe")
    assert [len(steps[name]) for name in ("strong-anchor", "weak-anchor")] == [2, 2]
    text = board.get(f"/compare?run={ids[0]}&run={ids[1]}").text
    assert "objective.lambda_fm" in text
    assert "validation, 100 samples" in text


def test_a_search_is_told(board: TestClient, gallery: Gallery) -> None:
    path = f"/searches/{gallery.runs['search']}"
    page = board.get(path).text
    trials = re.findall(r"trial (\d)<|>trial (\d)", page)
    assert [a or b for a, b in trials][:5] == ["4", "3", "2", "1", "0"]
    assert "better than the recipe" in page
    heat = chart(board, f"{path}/charts.json", "heat")["fid_nfe1"]
    # Anchor weights of 0.01, 0.04, ... lie in the second to the sixth of six bins of [0.001, 10];
    # the first trial was stopped at its first measurement.
    weights = [0.01 * 4**k for k in range(5)]
    expected = [[k + 1, 1 - k % 2, (90 if k == 0 else 60) / (1 + w)] for k, w in enumerate(weights)]
    assert heat == expected
    confirmed = chart(board, f"{path}/charts.json", "confirmed")["fid_nfe1"]
    assert [point[1] for point in confirmed] == [30.0, 20.0]
    lines = {one["key"]: one for one in board.get(f"{path}/charts.json").json()}["parallel"]
    assert len(lines["series"][0]["points"]) == 5
    assert [axis["name"] for axis in lines["axes"]][-1] == "fid_nfe1"


def test_promotion_passes_its_gates_or_says_why_not(
    config: BoardConfig, gallery: Gallery, tmp_path: Path
) -> None:
    """In a copy, which other tests do not see."""
    root = tmp_path / "runs"
    shutil.copytree(gallery.root, root)
    tracking = TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}")
    board = client(replace(config, storage_uri=str(root), tracking=tracking))
    store = new_client(tracking.resolve(root))

    def champion() -> str | None:
        found = find_version(store, MODEL, CHAMPION)
        return None if found is None else found.number

    first = board.post(
        f"/registry/{MODEL}/2/promote", content=b"nfe=1&reason=why%20not", headers=FORM
    )
    assert first.status_code == 303, first.text
    assert champion() == "2"
    page = board.get(f"/registry/{MODEL}/1").text
    assert "below 30 ± 0.1 by 1 joint standard errors (0.14)" in page
    assert "is 40 ± 0.1, not better than 30 ± 0.1" in page
    worse = board.post(f"/registry/{MODEL}/1/promote", content=b"nfe=1", headers=FORM)
    assert worse.status_code == 409
    assert "not better than 30" in worse.text
    assert champion() == "2"
    assert "is the champion" in board.get(f"/registry/{MODEL}/2").text
    nothing = board.post(f"/registry/{MODEL}/rollback", content=b"", headers=FORM)
    assert nothing.status_code == 409
    assert "no previous champion" in nothing.text

    better = Gallery(root, connect_store(tracking, root), {}).register(20.0)
    address = f"/registry/{MODEL}/{better.number}/promote"
    assert board.post(address, content=b"nfe=1", headers=FORM).status_code == 303
    assert champion() == better.number
    assert "Roll back to version 2" in board.get(f"/registry/{MODEL}").text
    back = board.post(f"/registry/{MODEL}/rollback", content=b"reason=oops", headers=FORM)
    assert back.status_code == 303
    assert champion() == "2"
    assert "version 2" in board.get(f"/registry/{MODEL}").text
    last = json.loads((root / f"promotions/{MODEL}/000003.json").read_text())
    assert last["why"].startswith("oops; roll back to digits version 2")


def test_an_empty_store_says_what_to_do(
    config: BoardConfig, empty_database: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    board = client(replace(config, storage_uri=str(tmp_path), tracking=tracking))
    assert "make quickstart" in board.get("/runs").text
    assert "jobs/search.py" in board.get("/searches").text
    assert "register_as" in board.get("/registry").text
    assert "No run is chosen" in board.get("/compare").text


def test_runs_without_numbers_and_under_way(board: TestClient, gallery: Gallery) -> None:
    empty = board.get(f"/runs/{gallery.runs['no-numbers']}")
    assert empty.status_code == 200
    assert "has not logged anything yet" in empty.text
    running = board.get(f"/runs/{gallery.runs['under-way']}")
    assert running.status_code == 200
    assert "state running" in running.text
    assert "data-refresh" in running.text


def test_a_training_is_silent_when_its_last_number_is_old(gallery: Gallery) -> None:
    runs = {run.run_id: run for run in read_runs(gallery.store.client, "facm")}
    training = runs[gallery.runs["under-way"]]
    assert silent_seconds(training) is None
    old = replace(training.metrics["loss"], milliseconds=training.started - 700_000)
    begun = training.started - 660_000
    training = replace(training, started=begun, metrics={"loss": old})
    assert silent_seconds(training) == pytest.approx(time.time() - begun / 1000, abs=1)
    assert silent_seconds(replace(training, status="FINISHED")) is None
    assert silent_seconds(replace(training, job="search")) is None


def test_a_run_that_is_written_grows(
    board: TestClient, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "FRESH_SECONDS", 0.0)
    run = open_run(gallery.store, "growing", job="distill", config=TrackingConfig())
    for count in (1, 2, 3):
        run.log_metrics({"loss": 1.0 / count}, 8 * count)
        deadline = time.monotonic() + 20
        while True:
            answer = board.get(f"/runs/{run.run_id}/charts.json")
            if answer.status_code == 200:
                told = {one["key"]: one for one in answer.json()}["losses"]["series"]
                if told and len(told[0]["points"]) == count:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    run.finish()


def test_a_server_that_goes_away_and_comes_back(
    config: BoardConfig, tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "FRESH_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = TrackingConfig(uri=tracking_server.uri)
    store = connect_store(tracking, tracking_server.folder)
    with open_run(store, "far", job="distill", config=tracking) as run:
        for count in (8, 16):
            run.log_metrics({"loss": 1.0, "loss_fm": 0.5}, count)
    # Through HTTP as from a database.
    (known,) = read_runs(store.client, "facm")
    curves = read_curves(store.client, [known.run_id], ["loss", "loss_fm", "none"])
    assert {key[1]: curve.images.tolist() for key, curve in curves.items()} == {
        "loss": [8, 16],
        "loss_fm": [8, 16],
    }
    board = client(replace(config, tracking=tracking))
    assert "far" in board.get("/runs").text
    tracking_server.kill()
    deadline = time.monotonic() + 60
    while "does not answer" not in (page := board.get("/runs")).text:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert page.status_code == 200
    assert "far" in page.text
    nobody = client(replace(config, tracking=tracking)).get("/runs")
    assert nobody.status_code == 503
    assert "MLFLOW_TRACKING_URI" in nobody.text
    tracking_server.start()
    deadline = time.monotonic() + 60
    while "does not answer" in board.get("/runs").text:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_store_that_never_was(config: BoardConfig) -> None:
    tracking = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    answer = client(replace(config, tracking=tracking)).get("/runs")
    assert answer.status_code == 503
    assert "does not answer" in answer.text


def test_what_is_vendored_is_what_the_lock_names() -> None:
    """The lock's hash is of the package's archive; that of the file in it was taken from there."""
    lock = json.loads((DASHBOARDS / "package-lock.json").read_text())
    assert "://" not in json.dumps(lock)
    version = lock["packages"]["node_modules/echarts"]["version"]
    vendor = DASHBOARDS / "facm_dashboards/static/vendor"
    file = vendor / f"echarts-{version}.min.js"
    recorded = json.loads((DASHBOARDS / "vendored.json").read_text())
    integrity = lock["packages"]["node_modules/echarts"]["integrity"]
    assert recorded["package"] == {"echarts": version, "integrity": integrity}
    found = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    assert recorded["files"] == {"dist/echarts.min.js": f"sha512-{found}"}
    assert "Apache License" in (vendor / "echarts-LICENSE").read_text()
    installed = DASHBOARDS / "node_modules/echarts/dist/echarts.min.js"
    if installed.exists():
        assert installed.read_bytes() == file.read_bytes()
    templates = (DASHBOARDS / "facm_dashboards/templates").glob("*.html")
    named = set(re.findall(r"vendor/[\w.-]+\.js", "".join(t.read_text() for t in templates)))
    assert named == {f"vendor/{file.name}"}


def test_scripts_of_our_own_parse() -> None:
    """Only where there is Node, which nothing else needs."""
    if (node := shutil.which("node")) is None:
        pytest.skip("no node to parse the scripts with; a browser does so in test_browser.py")
    for script in sorted((DASHBOARDS / "facm_dashboards/static").glob("*.js")):
        done = subprocess.run([node, "--check", script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
