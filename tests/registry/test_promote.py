"""Promotions in every direction, on a real store, through the job itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform.config import Refused, run_job
from facm_platform.registry import save_artifact
from facm_platform.registry.promote import PromoteConfig, prepare
from facm_platform.registry.versions import CHAMPION, Version, find_version, register_version
from facm_platform.tracking import Store, TrackingConfig, connect_store, open_run
from tests.conftest import TrackingServer
from tests.registry.test_artifact import DESCRIPTION, weights

MODEL = "digits"
ROOT = Path(__file__).resolve().parents[2]


def register(
    store: Store, folder: Path, fid: float | None, protocol: str = "p-1", **tags: str
) -> Version:
    """A new challenger with that FID at one step."""
    sha256 = save_artifact(folder / "artifact", weights(), DESCRIPTION)
    run = open_run(store, "r", job="evaluate", config=TrackingConfig())
    run.log_artifact(folder / "artifact", "model")
    known = {"protocol_id": protocol, "model_sha256": sha256}
    if fid is not None:
        known["fid_nfe1"] = repr(fid)
    return register_version(run, MODEL, "model", known | tags, "a test")


def config(store: Store, **changes: object) -> PromoteConfig:
    return PromoteConfig(model=MODEL, tracking=TrackingConfig(uri=store.uri), **changes)  # type: ignore[arg-type]


def champion(store: Store) -> str | None:
    found = find_version(store.client, MODEL, CHAMPION)
    return None if found is None else found.number


def refusal(store: Store, **changes: object) -> str:
    """Why the promotion is refused; the champion stays."""
    before = champion(store)
    with pytest.raises(Refused) as caught:
        prepare(config(store, **changes))
    assert champion(store) == before
    return str(caught.value)


def promote(store: Store) -> dict[str, float]:
    return prepare(config(store)).execute().metrics


def test_first_better_worse_equal(store: Store, tmp_path: Path) -> None:
    assert "no challenger" in refusal(store)
    register(store, tmp_path, 40.0)
    plan = prepare(config(store))
    assert "no champion yet" in plan.describe()
    assert champion(store) is None, "preparing changes nothing"
    result = plan.execute()
    assert result.metrics == {"fid": 40.0}
    assert result.artifact_uri == "models:/digits@champion"
    assert champion(store) == "1"
    assert "it is the champion already" in refusal(store)

    register(store, tmp_path, 39.5)
    assert promote(store) == {"fid": 39.5, "former_fid": 40.0}
    assert champion(store) == "2"

    register(store, tmp_path, 39.6)
    assert "is 39.6, not below 39.5 of the champion (digits version 2)" in refusal(store)
    register(store, tmp_path, 39.5)
    assert "is 39.5, not below 39.5" in refusal(store)
    register(store, tmp_path, float("nan"))
    assert "is nan, not below" in refusal(store)


def test_numbers_that_cannot_be_compared(store: Store, tmp_path: Path) -> None:
    register(store, tmp_path, 40.0)
    assert "at nfe = 2 was not measured" in refusal(store, nfe=2)
    promote(store)
    register(store, tmp_path, 1.0, protocol="p-2")
    assert "by protocol p-2, that of the champion (digits version 1) by p-1" in refusal(store)
    register(store, tmp_path, None)
    assert "at nfe = 1 was not measured" in refusal(store)
    register(store, tmp_path, 1.0, fid_nfe2="1.0")
    assert "champion (digits version 1) at nfe = 2 was not measured" in refusal(store, nfe=2)


def stored_file(version: Version, name: str) -> Path:
    return Path(version.source.removeprefix("file://")) / name


def test_broken_artefacts(store: Store, tmp_path: Path) -> None:
    flipped = register(store, tmp_path, 40.0)
    file = stored_file(flipped, "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "its artefact is broken: model.safetensors is damaged" in refusal(store)
    file.unlink()
    assert "its artefact is broken: not a model artefact" in refusal(store)
    for rest in file.parent.iterdir():
        rest.unlink()
    file.parent.rmdir()
    assert "artefact" in refusal(store)
    register(store, tmp_path, 40.0, model_sha256="e" * 64)
    assert "not the one evaluated" in refusal(store)
    register(store, tmp_path, 40.0)
    assert promote(store) == {"fid": 40.0}


def test_on_a_server(tracking_server: TrackingServer, tmp_path: Path) -> None:
    store = connect_store(TrackingConfig(uri=tracking_server.uri), tmp_path)
    register(store, tmp_path, 2.0)
    assert promote(store) == {"fid": 2.0}
    register(store, tmp_path, 3.0)
    assert "not below 2" in refusal(store)
    tracking_server.kill()
    with pytest.raises(InvalidInputError, match="does not answer"):
        prepare(config(store))


def test_exit_status_and_messages(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(store, tmp_path, 40.0)
    arguments = [f"model={MODEL}", f"tracking.uri={store.uri}"]

    def run(*more: str) -> int:
        return run_job(PromoteConfig, prepare, description="", argv=[*arguments, *more])

    assert run("--dry-run") == 0
    assert champion(store) is None
    assert run() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["metrics"] == {"fid": 40.0}
    assert run() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("refused: digits version 1 is not promoted: it is the champion")
    assert captured.out == ""
    assert run("nfe=0") == 2


def test_the_job_is_a_program(store: Store, tmp_path: Path) -> None:
    """Its embedded store is found by folder, and exit status 1 reaches the shell."""
    command = [sys.executable, str(ROOT / "jobs/promote.py"), f"model={MODEL}"]
    command.append(f"storage_uri={tmp_path / 'runs'}")
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "digits has no challenger" in done.stderr


def test_unusable_settings() -> None:
    for changes, field in (({"model": "a:b"}, "model"), ({"model": "a", "nfe": 0}, "nfe")):
        with pytest.raises(InvalidInputError) as caught:
            PromoteConfig(**changes)  # type: ignore[arg-type]
        assert caught.value.field == field
