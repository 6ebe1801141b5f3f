"""How many trials run side by side: as many as need not wait for one another."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import FIFOScheduler

from facm_core.errors import InvalidInputError
from facm_platform.config import load_config
from facm_platform.search.proposals import Listed
from facm_platform.search.records import Records
from facm_platform.search.runner import Room, _Feed, _Ledger, room_for
from facm_platform.search.trial import Trial
from facm_platform.training.config import ValidationConfig, WorkersConfig
from facm_platform.training.distill import DistillConfig, DistillPlan, prepare
from tests.world import World

VALIDATION = ValidationConfig(features_uri="f", samples=100)


@pytest.fixture
def plan(world: World, tmp_path: Path) -> DistillPlan:
    options = [*world.options("base", tmp_path), "train.images=8"]
    return prepare(load_config(DistillConfig, None, options))


@pytest.mark.parametrize(
    ("cpus", "gpus", "cluster", "trials"),
    [
        (1.01, 0, (4, 0), 3),
        (0.96, 0, (2, 0), 2),
        (1.51, 0, (1.5, 0), 0),
        (8.5, 4, (64, 8), 2),
        (8.5, 4, (16, 8), 1),
        (2.0, 1, (64, 0), 0),
    ],
)
def test_what_is_scarce_decides(
    cpus: float, gpus: int, cluster: tuple[float, float], trials: int
) -> None:
    assert Room(cpus, gpus, *cluster).trials == trials


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_takes_its_workers_their_data_and_its_measuring() -> None:
    room = room_for(WorkersConfig(max=2, cpus=0.5), VALIDATION)
    # Two workers, a read task, a validation, the driver of the trial; of four CPUs.
    assert room.cpus == pytest.approx(2 * 0.5 + 0.25 + 0.25 + 0.01)
    assert str(room) == "room for 2 trials at once: the cluster has 4 CPUs, a trial takes 1.51"
    with pytest.raises(InvalidInputError) as refused:
        room_for(WorkersConfig(max=4, cpus=1), VALIDATION)
    said = "workers = 4: room for 0 trials at once: the cluster has 4 CPUs, a trial takes 4.51."
    assert str(refused.value).startswith(said)
    with pytest.raises(InvalidInputError, match=re.escape("4 CPUs and 0 GPUs, a trial takes")):
        room_for(WorkersConfig(max=1, cpus=1, gpu=True), VALIDATION)


def test_a_driver_that_never_began_is_a_trial_that_failed(
    tmp_path: Path, plan: DistillPlan
) -> None:
    """Ray could not start its process: there is an end without a beginning."""
    records, told = Records(str(tmp_path / "trials")), []
    proposals = Listed([Trial(0, "t-0", {"a": 1}, {"train.seed": 1}, plan)])
    feed = _Feed(proposals, records, FIFOScheduler(), {})
    ledger = _Ledger(feed, proposals, records, lambda record: told.append(record.state))
    assert feed.suggest("tune-0") != feed.FINISHED
    ledger.on_trial_error(0, [], SimpleNamespace(trial_id="tune-0", get_error=lambda: None))  # type: ignore[arg-type]
    (record,) = Records(str(tmp_path / "trials"))
    assert (record.name, record.state, record.values) == ("t-0", "failed", {"train.seed": 1})
    assert record.reason == "its driver could not be started"
    assert told == ["failed"]
    ledger.close()
    assert told == ["failed"]
