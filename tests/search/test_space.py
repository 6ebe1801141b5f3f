"""What a search file may vary, and what trials get of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import optuna
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.search.space import Values, parse

GIVEN: dict[str, Any] = {
    "objective": {
        "lambda_fm": {"log_uniform": [1e-3, 10]},
        "p": 0.5,
        "times": {
            "one_of": [
                {"kind": "arctan_lognormal", "mean": {"uniform": [-0.5, 2]}, "std": 1.6},
                {"kind": "logit_normal", "std": {"uniform": [0.5, 2]}},
                {"kind": "uniform"},
            ]
        },
    },
    "train": {
        "global_batch_size": {"choice": [8, 16]},
        "warmup_images": {"integer": [0, 3]},
        "betas": {"choice": [[0.9, 0.99], [0.9, 0.999]]},
    },
}
ALWAYS = {
    "objective.lambda_fm",
    "objective.p",
    "objective.times.kind",
    "train.global_batch_size",
    "train.warmup_images",
    "train.betas",
}
BESIDE = {
    "arctan_lognormal": {"objective.times.mean", "objective.times.std"},
    "logit_normal": {"objective.times.std"},
    "uniform": set(),
}


@pytest.fixture(scope="module")
def samples() -> list[Values]:
    space = parse(GIVEN)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(1000)]


def test_values_of_one_alternative_never_reach_another(samples: list[Values]) -> None:
    kinds = Counter(values["objective.times.kind"] for values in samples)
    assert kinds.keys() == BESIDE.keys()
    assert min(kinds.values()) > 270
    for values in samples:
        assert values.keys() == ALWAYS | BESIDE[values["objective.times.kind"]]


def test_values_lie_where_they_are_said_to(samples: list[Values]) -> None:
    weights = [values["objective.lambda_fm"] for values in samples]
    assert all(1e-3 <= weight <= 10 for weight in weights)
    # By logarithm, a quarter of them in each of four decades.
    decades = Counter(math.floor(math.log10(weight)) for weight in weights)
    assert all(200 < decades[decade] < 300 for decade in (-3, -2, -1, 0))
    stds = {"arctan_lognormal": (1.6, 1.6), "logit_normal": (0.5, 2)}
    for values in samples:
        assert values["objective.p"] == 0.5
        assert values["train.global_batch_size"] in (8, 16)
        assert values["train.warmup_images"] in range(4)
        assert values["train.betas"] in ([0.9, 0.99], [0.9, 0.999])
        if "objective.times.std" in values:
            low, high = stds[values["objective.times.kind"]]
            assert low <= values["objective.times.std"] <= high
    assert {values["train.warmup_images"] for values in samples} == {0, 1, 2, 3}


def test_every_end_of_every_range_is_an_edge() -> None:
    edges = list(parse(GIVEN).edges())
    for key, ends in {
        "objective.lambda_fm": {1e-3, 10},
        "train.global_batch_size": {8, 16},
        "train.warmup_images": {0, 3},
        "objective.times.mean": {-0.5, 2},
        "objective.times.std": {0.5, 2, 1.6},
        "objective.times.kind": BESIDE.keys(),
    }.items():
        assert {edge[key] for edge in edges if key in edge} == set(ends)
    for edge in edges:
        assert edge.keys() == ALWAYS | BESIDE[edge["objective.times.kind"]]


def test_a_grid_is_every_combination_once() -> None:
    space = parse(
        {
            "a": {"choice": ["x", "y"]},
            "b": {"one_of": [{"kind": "u", "c": {"integer": [1, 3]}}, {"kind": "v"}]},
        }
    )
    study = optuna.create_study()
    for params in space.grid():
        study.enqueue_trial(params)
    got = [space.suggest(study.ask()) for _ in range(int(space.size))]
    wanted = [{"a": a, "b.kind": "u", "b.c": c} for a in "xy" for c in (1, 2, 3)]
    wanted += [{"a": a, "b.kind": "v"} for a in "xy"]
    assert sorted(map(repr, map(sorted_items, got))) == sorted(map(repr, map(sorted_items, wanted)))
    assert parse(GIVEN).size == math.inf


def sorted_items(values: Values) -> list[tuple[str, Any]]:
    return sorted(values.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"p": {"uniform": [1, 1]}}, "space.p = [1, 1]: an empty range"),
        ({"p": {"uniform": [2, 1]}}, "space.p = [2, 1]: an empty range"),
        ({"p": {"uniform": [0, math.inf]}}, "space.p = [0, inf]: an empty range"),
        ({"p": {"uniform": ["a", "b"]}}, "space.p = ['a', 'b']: an empty range"),
        ({"p": {"uniform": 3}}, "space.p = 3: an empty range"),
        ({"p": {"log_uniform": [0, 1]}}, "space.p = [0, 1]: has no logarithm"),
        ({"p": {"integer": [0, 1.5]}}, "space.p = [0, 1.5]: no whole numbers"),
        ({"p": {"choice": []}}, "space.p = []: not a list of different values"),
        ({"p": {"choice": [1, 1]}}, "space.p = [1, 1]: not a list of different values"),
        ({"p": {"choice": "ab"}}, "space.p = 'ab': not a list of different values"),
        ({"p": {"one_of": [{"a": 1}]}}, "space.p = [{'a': 1}]: not two or more sections"),
        ({"p": {"one_of": [1, 2]}}, "space.p = [1, 2]: not two or more sections"),
        ({"p": {"uniform": [0, 1], "kind": "a"}}, "uniform must stand alone"),
    ],
)
def test_what_is_no_space_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        parse(given)
