"""Where runs go, and what is said when they cannot go there."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform.tracking import TrackingConfig, check_store, connect_store

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_argument_wins_over_the_environment_and_that_over_the_embedded_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TrackingConfig().resolve(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here:1")
    assert TrackingConfig().resolve(tmp_path) == "http://here:1"
    assert TrackingConfig(uri="http://there:2").resolve(tmp_path) == "http://there:2"


def test_the_embedded_store_lies_in_the_given_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    check_store(TrackingConfig(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists(), "a check creates nothing"

    store = connect_store(TrackingConfig(experiment="mine"), tmp_path / "runs")
    run = store.client.create_run(store.experiment_id)
    store.client.log_text(run.info.run_id, "hello", "greeting.txt")
    assert list(elsewhere.iterdir()) == []
    assert [file.name for file in (tmp_path / "runs/artifacts/mine").rglob("*.txt")] == [
        "greeting.txt"
    ]
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as database:
        names = [name for (name,) in database.execute("select name from experiments")]
    assert "mine" in names
    again = connect_store(TrackingConfig(experiment="mine"), tmp_path / "runs")
    assert again.experiment_id == store.experiment_id

    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(InvalidInputError, match="bin"):
        connect_store(TrackingConfig(experiment="mine"), tmp_path / "runs")


@pytest.mark.parametrize("use", [check_store, connect_store])
def test_a_server_that_does_not_answer_is_named(use: object, tmp_path: Path) -> None:
    assert callable(use)
    with pytest.raises(InvalidInputError, match=r"127\.0\.0\.1:9.*does not answer") as caught:
        use(TrackingConfig(uri=NOBODY), tmp_path)
    assert caught.value.field == "tracking.uri"


def test_unusable_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="experiment"):
        TrackingConfig(experiment=" ")
    with pytest.raises(InvalidInputError, match="plain folders"):
        TrackingConfig(uri="./mlruns")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="cannot write"):
        check_store(TrackingConfig(), tmp_path / "file" / "runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "somewhere")
    with pytest.raises(InvalidInputError, match="MLFLOW_TRACKING_URI"):
        check_store(TrackingConfig(), tmp_path)
