"""Promotions in every direction, on a real store, through the job itself."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import pytest
import safetensors.torch

from facm_core.errors import InvalidInputError
from facm_platform.config import JobResult, Refused, run_job
from facm_platform.registry import load_artifact, promote, save_artifact
from facm_platform.registry.promote import PromoteConfig, prepare
from facm_platform.registry.reproduction import SAMPLES, write_samples
from facm_platform.registry.versions import (
    CHAMPION,
    PREVIOUS,
    Version,
    find_version,
    register_version,
)
from facm_platform.tracking import Store, TrackingConfig, connect_store, open_run
from tests.conftest import TrackingServer
from tests.registry.test_artifact import DESCRIPTION, weights

MODEL = "digits"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Registry:
    """A registered model, and the folder of its runs."""

    store: Store
    folder: Path

    def register(
        self,
        fid: float | None,
        protocol: str = "p-1",
        error: float | None = 0.1,
        **tags: str,
    ) -> Version:
        """A new challenger with that FID at one step."""
        folder = self.folder / "artifact"
        sha256 = save_artifact(folder, weights(), DESCRIPTION)
        write_samples(folder, load_artifact(str(folder)))
        run = open_run(self.store, "r", job="evaluate", config=TrackingConfig())
        run.log_artifact(folder, "model")
        known = {"protocol_id": protocol, "model_sha256": sha256}
        if fid is not None:
            known["fid_nfe1"] = repr(fid)
        if error is not None:
            known["fid_nfe1_error"] = repr(error)
        return register_version(run, MODEL, "model", known | tags, "a test")

    def config(self, **changes: object) -> PromoteConfig:
        given = {"storage_uri": str(self.folder / "runs")} | changes
        return PromoteConfig(model=MODEL, tracking=TrackingConfig(uri=self.store.uri), **given)  # type: ignore[arg-type]

    def alias(self, name: str = CHAMPION) -> str | None:
        found = find_version(self.store.client, MODEL, name)
        return None if found is None else found.number

    def refusal(self, **changes: object) -> str:
        """Why the promotion is refused; the champion stays."""
        before = self.alias()
        with pytest.raises(Refused) as caught:
            prepare(self.config(**changes))
        assert self.alias() == before
        return str(caught.value)

    def promote(self, **changes: object) -> dict[str, float]:
        return prepare(self.config(**changes)).execute().metrics

    def tags(self, number: str) -> dict[str, str]:
        return dict(self.store.client.get_model_version(MODEL, number).tags)


@pytest.fixture
def registry(store: Store, tmp_path: Path) -> Registry:
    return Registry(store, tmp_path)


def test_first_better_worse_and_within_noise(registry: Registry) -> None:
    assert "no challenger" in registry.refusal()
    registry.register(40.0)
    plan = prepare(registry.config())
    assert "no champion yet" in plan.describe()
    assert registry.alias() is None, "preparing changes nothing"
    result = plan.execute()
    assert result.metrics == {"fid": 40.0}
    assert result.artifact_uri == "models:/digits@champion"
    assert registry.alias() == "1"
    assert "it is the champion already" in registry.refusal()

    registry.register(39.5)
    assert registry.promote() == {"fid": 39.5, "former_fid": 40.0}
    assert (registry.alias(), registry.alias(PREVIOUS)) == ("2", "1")

    registry.register(39.6)
    expected = "is 39.6 ± 0.1, not better than 39.5 ± 0.1 of the champion (digits version 2)"
    assert expected in registry.refusal()
    # The joint error is √2 · 0.1.
    registry.register(39.36)
    assert "by more than 1 joint standard errors" in registry.refusal()
    assert "by more than 2 joint" in registry.refusal(z=2.0)
    assert "is 39.36" in prepare(registry.config(z=0.9)).describe().replace("FID ", "is ")
    registry.register(39.35)
    assert prepare(registry.config()).describe().startswith("promote digits version 5: FID 39.35")
    registry.register(float("nan"))
    assert "its FID at nfe = 1 is nan" in registry.refusal()


def test_numbers_that_cannot_be_compared(registry: Registry) -> None:
    registry.register(40.0)
    assert "at nfe = 2 was not measured" in registry.refusal(nfe=2)
    registry.promote()
    registry.register(1.0, protocol="p-2")
    assert "by protocol p-2, that of the champion (digits version 1) by p-1" in registry.refusal()
    registry.register(None)
    assert "at nfe = 1 was not measured" in registry.refusal()
    registry.register(1.0, fid_nfe2="1.0")
    assert "champion (digits version 1) at nfe = 2 was not measured" in registry.refusal(nfe=2)
    registry.register(1.0, error=None)
    assert "the error of its FID or of that of the champion" in registry.refusal()
    assert registry.promote(z=0.0) == {"fid": 1.0, "former_fid": 40.0}


def test_precision_has_a_floor(registry: Registry) -> None:
    registry.register(40.0)
    assert "its precision at nfe = 1 was not measured" in registry.refusal(min_precision=0.5)
    registry.register(40.0, precision_nfe1="0.49")
    assert "its precision at nfe = 1 is 0.49, below 0.5" in registry.refusal(min_precision=0.5)
    assert registry.promote(min_precision=0.49) == {"fid": 40.0}


def test_every_failed_gate_is_told(registry: Registry) -> None:
    registry.register(40.0)
    registry.promote()
    version = registry.register(41.0, precision_nfe1="0.2")
    stored_file(version, SAMPLES).unlink()
    told = registry.refusal(min_precision=0.5)
    for gate in ("below 0.5", "not better than 40", "no samples"):
        assert gate in told


def stored_file(version: Version, name: str) -> Path:
    return Path(version.source.removeprefix("file://")) / name


def test_broken_artefacts(registry: Registry) -> None:
    flipped = registry.register(40.0)
    file = stored_file(flipped, "model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "its artefact is broken: model.safetensors is damaged" in registry.refusal()
    file.unlink()
    assert "its artefact is broken: not a model artefact" in registry.refusal()
    for rest in file.parent.iterdir():
        rest.unlink()
    file.parent.rmdir()
    assert "artefact" in registry.refusal()
    registry.register(40.0, model_sha256="e" * 64)
    assert "not the one evaluated" in registry.refusal()
    registry.register(40.0)
    assert registry.promote() == {"fid": 40.0}


def test_samples_must_be_made_again_bit_for_bit(registry: Registry) -> None:
    version = registry.register(40.0)
    file = stored_file(version, SAMPLES)
    latents = safetensors.torch.load_file(file)["latents"]
    assert latents.shape == (16, 2, 4, 4)
    latents[3, 0, 1, 1] = latents[3, 0, 1, 1].nextafter(latents.new_tensor(9.0))
    safetensors.torch.save_file({"latents": latents}, file)
    assert "it does not make its stored samples [3] again" in registry.refusal()
    safetensors.torch.save_file({"latents": latents[:8]}, file)
    assert "its samples are (16, 2, 4, 4), the stored ones (8, 2, 4, 4)" in registry.refusal()
    file.write_bytes(b"nothing")
    assert f"{SAMPLES} is damaged" in registry.refusal()


def test_the_audit_says_who_when_and_why(registry: Registry) -> None:
    registry.register(40.0)
    registry.promote(reason="first of all")
    tags = registry.tags("1")
    assert tags["facm.promoted_by"] == getpass.getuser()
    assert tags["facm.promoted_at"].startswith("20")
    assert tags["facm.promoted_because"].startswith("first of all; promote digits version 1: FID")
    kept = json.loads((registry.folder / "runs/promotions/digits/000001.json").read_text())
    assert (kept["version"], kept["previous"], kept["who"]) == ("1", None, getpass.getuser())


def test_rollback_restores_and_can_be_taken_back(registry: Registry) -> None:
    registry.register(40.0)
    assert "no previous champion to go back to" in registry.refusal(rollback=True)
    registry.promote()
    registry.register(30.0)
    registry.promote()
    assert prepare(registry.config(rollback=True)).describe().startswith("roll back to digits ve")
    assert registry.promote(rollback=True) == {"fid": 40.0, "former_fid": 30.0}
    assert (registry.alias(), registry.alias(PREVIOUS)) == ("1", "2")
    registry.promote(rollback=True)
    assert (registry.alias(), registry.alias(PREVIOUS)) == ("2", "1")
    assert "roll back to digits version 2" in registry.tags("2")["facm.promoted_because"]


def test_of_two_at_once_one_wins_and_none_is_lost(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fid in (40.0, 30.0, 20.0):
        registry.register(fid)
    registry.promote(version=1)
    plans = [prepare(registry.config(version=number)) for number in (2, 3)]
    together = Barrier(2)

    def execute(plan: promote.PromotePlan) -> JobResult | str:
        together.wait()
        try:
            return plan.execute()
        except Refused as refusal:
            return str(refusal)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(execute, plans))
    (lost,) = (result for result in results if isinstance(result, str))
    (won,) = (result for result in results if isinstance(result, JobResult))
    winner = registry.alias()
    assert won.run_name == f"digits version {winner}"
    loser = {"2": "3", "3": "2"}[str(winner)]
    assert f"version {loser} is not promoted: version {winner} was, by {getpass.getuser()}" in lost
    assert registry.alias(PREVIOUS) == "1"
    # The other one can still be: against the champion that there is now.
    if winner == "2":
        assert registry.promote(version=3) == {"fid": 20.0, "former_fid": 30.0}
    else:
        assert "not better than 20" in registry.refusal(version=2)


def test_a_promotion_that_died_half_way_is_completed(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fid in (40.0, 30.0, 29.9, 20.0):
        registry.register(fid)
    registry.promote(version=1)
    client = registry.store.client

    def die(*_: object) -> None:
        raise ConnectionError

    plan = prepare(registry.config(version=2))
    with monkeypatch.context() as patch:
        patch.setattr(type(client), "set_registered_model_alias", die)
        with pytest.raises(ConnectionError):
            plan.execute()
    assert registry.alias() == "1"
    # It counts: the next one is compared with it, and completes it.
    assert "not better than 30 ± 0.1 of the champion (digits version 2)" in registry.refusal(
        version=3
    )
    assert registry.promote(version=4) == {"fid": 20.0, "former_fid": 30.0}
    assert (registry.alias(), registry.alias(PREVIOUS)) == ("4", "2")
    assert "facm.promoted_by" in registry.tags("2")


def test_an_alias_that_was_moved_by_hand_counts(registry: Registry) -> None:
    for fid in (40.0, 30.0, 35.0):
        registry.register(fid)
    registry.promote(version=2)
    assert "not better than 30" in registry.refusal(version=3)
    registry.store.client.set_registered_model_alias(MODEL, CHAMPION, "1")
    assert registry.promote(version=3) == {"fid": 35.0, "former_fid": 40.0}
    assert registry.alias(PREVIOUS) == "1"


def test_on_a_server(tracking_server: TrackingServer, tmp_path: Path) -> None:
    store = connect_store(TrackingConfig(uri=tracking_server.uri), tmp_path)
    registry = Registry(store, tmp_path)
    registry.register(2.0)
    assert registry.promote() == {"fid": 2.0}
    registry.register(3.0)
    assert "not better than 2" in registry.refusal()
    assert "no version 7" in registry.refusal(version=7)
    tracking_server.kill()
    with pytest.raises(InvalidInputError, match="does not answer"):
        prepare(registry.config())


def test_exit_status_and_messages(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.register(40.0)
    arguments = [f"model={MODEL}", f"tracking.uri={registry.store.uri}"]
    arguments.append(f"storage_uri={registry.folder / 'runs'}")

    def run(*more: str) -> int:
        return run_job(PromoteConfig, prepare, description="", argv=[*arguments, *more])

    assert run("--dry-run") == 0
    assert registry.alias() is None
    assert run() == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["metrics"] == {"fid": 40.0}
    assert run() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("refused: digits version 1 is not promoted: it is the champion")
    assert captured.out == ""
    assert run("nfe=0") == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"z": -1.0}, "z = -1.0: negative"),
        ({"min_precision": 1.5}, "min_precision = 1.5: no share"),
        ({"rollback": True, "version": 2}, "a rollback is to the previous champion"),
    ],
)
def test_bad_values_name_their_field(
    registry: Registry, option: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        registry.config(**option)


def test_the_job_is_a_program(store: Store, tmp_path: Path) -> None:
    """Its embedded store is found by folder, and exit status 1 reaches the shell."""
    command = [sys.executable, str(ROOT / "jobs/promote.py"), f"model={MODEL}"]
    command.append(f"storage_uri={tmp_path / 'runs'}")
    environment = {"PATH": "/usr/bin:/bin"}
    for more, message in ([], "digits has no challenger"), (["--rollback"], "no previous champion"):
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1
        assert message in done.stderr


def test_unusable_settings() -> None:
    for changes, field in (({"model": "a:b"}, "model"), ({"model": "a", "nfe": 0}, "nfe")):
        with pytest.raises(InvalidInputError) as caught:
            PromoteConfig(**changes)  # type: ignore[arg-type]
        assert caught.value.field == field
