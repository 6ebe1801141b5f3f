"""Optuna's proposals: seeded, conditional, and the same after an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from optuna.trial import TrialState

from facm_platform.search.config import AlgorithmConfig
from facm_platform.search.proposals import Study
from facm_platform.search.records import FAILED, FINISHED, STOPPED, Record
from facm_platform.search.space import Values, parse
from facm_platform.search.trial import Trial
from tests.search.conftest import SPACE

ONE = ("fid_nfe1",)


def study_of(
    kind: str,
    earlier: Iterable[Record] = (),
    *,
    trials: int | None = 12,
    space: dict[str, Any] = SPACE,
    objectives: tuple[str, ...] = ONE,
) -> Study:
    def make(number: int, params: Mapping[str, Any], values: Values) -> Trial:
        return Trial(number, f"s-{number:04d}", dict(params), values, cast(Any, None))

    algorithm = AlgorithmConfig(kind=kind, seed=3, startup_trials=4)
    return Study(parse(space), algorithm, objectives, trials, earlier, make)


def outcome(trial: Trial, state: str = FINISHED) -> Record:
    """Better the nearer the anchor weight is to 1."""
    distance = 5 + abs(trial.values["objective.lambda_fm"] - 1)
    measured = [{"images_seen": n, "fid_nfe1": distance + 1 / n} for n in (10.0, 20.0)]
    return Record(trial.number, trial.name, trial.params, trial.values, state, "", measured)


def run(study: Study, first: int | None = None) -> list[Record]:
    """All its trials, or so many, one after the other."""
    records: list[Record] = []
    while len(records) != first and (trial := study.next()) is not None:
        records.append(outcome(trial))
        study.ended(records[-1])
    return records


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_an_interrupted_search_proposes_what_it_would_have(kind: str) -> None:
    undisturbed = run(study_of(kind))
    assert len({repr(record.values) for record in undisturbed}) == 12
    earlier = run(study_of(kind), first=5)
    assert run(study_of(kind, earlier)) == undisturbed


def test_another_seed_is_another_search() -> None:
    first = study_of("random").next()
    other = Study(
        parse(SPACE),
        AlgorithmConfig(kind="random", seed=4),
        ONE,
        1,
        (),
        lambda *trial: cast(Any, SimpleNamespace(name="t", values=trial[2])),
    ).next()
    assert first is not None
    assert other is not None
    assert first.values != other.values


def test_tpe_learns_and_random_does_not() -> None:
    def best_of_last(kind: str) -> float:
        records = run(study_of(kind, trials=60))[30:]
        return sum(record.last["fid_nfe1"] for record in records) / len(records)

    assert best_of_last("tpe") < best_of_last("random") - 0.3


def test_optuna_hears_what_became_of_each() -> None:
    study = study_of("tpe", trials=3)
    trials = [study.next() for _ in range(3)]
    assert study.next() is None
    for trial, state in zip(trials, (FINISHED, STOPPED, FAILED), strict=True):
        assert trial is not None
        study.ended(outcome(trial, state))
    told = study.study.trials
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [trial.state for trial in told] == states
    assert told[0].value == told[0].intermediate_values[20]
    assert list(told[1].intermediate_values) == [10, 20]


def test_two_objectives() -> None:
    study = study_of("nsga2", objectives=("fid_nfe1", "fid_nfe2"), trials=2)
    trial = study.next()
    assert trial is not None
    record = outcome(trial)
    record.measured = [{"images_seen": 20.0, "fid_nfe1": 3.0, "fid_nfe2": 2.0}]
    study.ended(record)
    assert study.study.best_trials[0].values == [3.0, 2.0]
    assert isinstance(study.study.sampler, optuna.samplers.NSGAIISampler)


def test_a_grid_is_run_once() -> None:
    space = {"objective": {"lambda_fm": {"choice": [0.1, 1.0, 10.0]}, "p": {"choice": [0.5, 1]}}}
    records = run(study_of("grid", trials=None, space=space))
    got = [tuple(record.values.values()) for record in records]
    assert got == [(weight, p) for weight in (0.1, 1.0, 10.0) for p in (0.5, 1)]
    resumed = run(study_of("grid", records[:4], trials=None, space=space))
    assert resumed == records
