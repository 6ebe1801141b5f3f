"""Successive halving, and how it takes the error of a measurement into account."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from facm_platform.search.config import AlgorithmConfig, StoppingConfig
from facm_platform.search.records import Record
from facm_platform.search.schedulers import Halving, Population, scheduler_of
from facm_platform.search.space import parse
from tests.search.conftest import make_config

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def halving(tmp_path: Path, **changes: Any) -> Halving:
    stopping = StoppingConfig(first_images=10, reduction_factor=2, **changes)
    return Halving(replace(make_config(tmp_path), stopping=stopping))


def decide(
    scheduler: Halving, number: int, distance: float, error: float = 0.0, images: int = 10
) -> str:
    trial: Any = SimpleNamespace(
        trial_id=f"t{number}", config={"trial": SimpleNamespace(number=number)}
    )
    if trial.trial_id not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    result = {"images_seen": images, "fid_nfe1": distance, "fid_nfe1_error": error}
    return scheduler.on_trial_result(None, trial, result)


def test_a_trial_goes_on_if_it_is_in_the_better_half(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)
    distances = np.random.default_rng(0).permutation(np.arange(1.0, 21.0))
    seen: list[float] = []
    for number, distance in enumerate(distances):
        wanted = STOP if seen and distance > np.median(seen) else CONTINUE
        assert decide(scheduler, number, distance) == wanted
        seen.append(distance)


@pytest.mark.parametrize(
    ("error", "z", "wanted"),
    [(0.9, 1.0, STOP), (1.1, 1.0, CONTINUE), (1.1, 0.5, STOP), (0.6, 2.0, CONTINUE)],
)
def test_noise_stops_no_trial(tmp_path: Path, error: float, z: float, wanted: str) -> None:
    scheduler = halving(tmp_path, z=z)
    assert decide(scheduler, 0, 5.0) == CONTINUE
    assert decide(scheduler, 1, 6.0, error) == wanted
    # On the rung it stands with what was measured, not with what it might have been.
    assert list(scheduler._brackets[0]._rungs[-1][1].values()) == [-5.0, -6.0]


def test_the_next_rung_is_later(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)
    for number in range(2):
        assert decide(scheduler, number, 5.0) == CONTINUE
        assert decide(scheduler, number, 4.0 + number, images=15) == CONTINUE
    assert decide(scheduler, 0, 3.0, images=20) == CONTINUE
    assert decide(scheduler, 1, 3.5, images=20) == STOP


def test_trials_of_an_earlier_attempt_stand_on_their_rungs(tmp_path: Path) -> None:
    undisturbed, resumed = halving(tmp_path), halving(tmp_path)
    earlier = [4.0, 6.0, 3.0, 5.0]
    for number, distance in enumerate(earlier):
        decide(undisturbed, number, distance)
        measured = [{"images_seen": 10.0, "fid_nfe1": distance, "fid_nfe1_error": 0.0}]
        resumed.replay(Record(number, f"s-{number:04d}", {}, {}, "stopped", "", measured))
    for number, distance in enumerate([4.4, 4.6, 2.0, 3.9], start=4):
        both = [decide(one, number, distance) for one in (undisturbed, resumed)]
        assert both[0] == both[1]


def test_brackets_have_later_first_rungs(tmp_path: Path) -> None:
    scheduler = halving(tmp_path, kind="hyperband", brackets=2)
    first, second = (bracket._rungs[-1][0] for bracket in scheduler._brackets)
    assert (first, second) == (10, 20)
    # Odd trials are in the second, where nothing is decided so soon.
    assert decide(scheduler, 0, 1.0) == CONTINUE
    assert decide(scheduler, 1, 9.0) == CONTINUE
    assert decide(scheduler, 2, 9.0) == STOP


def test_a_population_stays_in_its_ranges(tmp_path: Path) -> None:
    space = parse(
        {
            "objective": {"lambda_fm": {"log_uniform": [0.1, 10]}, "p": {"choice": [0.25, 0.5, 1]}},
            "train": {"warmup_images": {"integer": [2, 4]}},
        }
    )
    base = make_config(tmp_path)
    config = replace(
        base,
        algorithm=AlgorithmConfig(kind="pbt"),
        stopping=replace(base.stopping, kind="none"),
    )
    scheduler = scheduler_of(config, space)
    assert isinstance(scheduler, Population)
    weights, others = set[float](), set[tuple[float, int]]()
    trial: Any = SimpleNamespace()
    values = {"objective.lambda_fm": 9.0, "objective.p": 0.5, "train.warmup_images": 3}
    trial.config = {"values": values, "trial": "kept"}
    for _ in range(200):
        changed, _ = scheduler._get_new_config(trial, trial)
        got = changed["values"]
        weights.add(got["objective.lambda_fm"])
        others.add((got["objective.p"], got["train.warmup_images"]))
        assert changed["trial"] == "kept"
    assert min(weights) >= 0.1
    # Times 1.2 would be beyond the end.
    assert max(weights) == 10
    assert 7.2 in {round(weight, 9) for weight in weights}
    assert others == {(p, n) for p in (0.25, 0.5, 1) for n in (2, 3, 4)}


def test_which_scheduler(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert isinstance(scheduler_of(config, parse(config.space)), Halving)
    config = replace(config, stopping=replace(config.stopping, kind="none"))
    assert isinstance(scheduler_of(config, parse(config.space)), FIFOScheduler)


def test_the_end_of_a_trial_is_no_rung(tmp_path: Path) -> None:
    scheduler = halving(tmp_path)
    assert decide(scheduler, 0, 1.0, images=80) == CONTINUE
    assert decide(scheduler, 1, 9.0, images=79) == STOP
    assert max(rung for rung, _ in scheduler._brackets[0]._rungs) < 80
