"""jobs/overhead.py: what it measures, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

from facm_core.errors import InvalidInputError
from facm_platform.config import load_config
from facm_platform.tracking import Store
from facm_platform.training.config import TrainConfig
from facm_platform.training.distill import DistillConfig
from facm_platform.training.overhead import OverheadPlan, prepare, validation_cost
from tests.world import World

Inputs = tuple[Path, str, str]


@pytest.fixture
def inputs(tmp_path: Path, digits_uri: str, teacher_uri: str) -> Inputs:
    return tmp_path / "runs", digits_uri, teacher_uri


def planned(inputs: Inputs, *options: str) -> OverheadPlan:
    runs, digits_uri, teacher_uri = inputs
    given = [
        "run.name=speed",
        f"run.storage_uri={runs}",
        f"run.tracking.uri=sqlite:///{runs}/mlflow.db",
        f"data.uri={digits_uri}",
        f"teacher.uri={teacher_uri}",
        "train.images=160",
        "train.global_batch_size=8",
        "workers.max=1",
    ]
    return prepare(load_config(DistillConfig, None, [*given, *options]))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_platform_beside_the_bare_loop(
    inputs: Inputs, store: Store, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    runs, _, _ = inputs
    inputs = (runs, world.data, world.teacher)
    given = [f"validation.features_uri={world.features}", "validation.samples=100"]
    metrics = planned(inputs, *given).execute().metrics
    assert all(metrics[name] > 0 for name in metrics if name.endswith("_seconds"))
    bare = metrics["bare_seconds"]
    windows = json.loads((runs / "speed-platform" / "windows.json").read_text())
    assert len(windows) == 4  # of twenty steps; the last one has no end
    assert bare == median(one for one, _ in windows[1:])
    assert metrics["platform_seconds"] == median(other for _, other in windows[1:])
    assert metrics["overhead"] == median(other / one for one, other in windows[1:]) - 1
    stalls = [metrics[f"{kind}checkpoint_seconds"] for kind in ("", "synchronous_")]
    assert metrics["checkpoint_stall"] == pytest.approx(stalls[0] / stalls[1])
    assert (runs / "speed-validated" / "windows.json").exists()
    # To hand a checkpoint over takes less than to write and upload it.
    assert metrics["checkpoint_stall"] < 1
    assert f"{bare:.3f} s" in capfd.readouterr().out


def test_the_three_runs_differ_in_their_checkpoints(inputs: Inputs, store: Store) -> None:
    plans = planned(inputs).distillations
    trains = {name: plan.config.train for name, plan in plans.items()}
    assert [plan.config.run.name for plan in plans.values()] == [f"speed-{name}" for name in plans]
    assert {name: t.checkpoint_images for name, t in trains.items()} == {
        "platform": 320,
        "asynchronous": 64,
        "synchronous": 64,
    }
    assert [t.max_lost_images for t in trains.values()] == [None, None, 64]
    assert {t.log_images for t in trains.values()} == {32}


def test_a_validation_is_measured_in_a_run_of_its_own(
    inputs: Inputs, store: Store, world: World
) -> None:
    runs, _, _ = inputs
    inputs = (runs, world.data, world.teacher)
    given = [f"validation.features_uri={world.features}", "validation.samples=100"]
    configs = {name: p.config for name, p in planned(inputs, *given).distillations.items()}
    validated = {name for name, config in configs.items() if config.validation is not None}
    assert (len(configs), validated) == (4, {"validated"})
    assert configs["validated"].train.checkpoint_images == TrainConfig.checkpoint_images


def test_steps_beside_a_measurement_and_others() -> None:
    """Those windows count in which the one or the other was so from end to end."""
    windows = [(0.0, 1.0), (0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (1.0, 9.0), (0.0, 5.0), (0.0, 6.0)]
    assert validation_cost(windows) == {
        "unvalidated_seconds": 3.0,
        "validated_seconds": 3.5,
        "validated_share": 0.5,
        "validated_speed": pytest.approx(3 / (30 / 7)),
    }
    assert validation_cost(windows[:2]) == validation_cost(windows[2:4]) == {}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("workers.max=2", "workers.max = 2: the bare loop is one process"),
        ("train.images=80", "train.images = 80: 10 steps are too few to measure"),
    ],
)
def test_what_cannot_be_compared_is_refused(inputs: Inputs, option: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        planned(inputs, option)
