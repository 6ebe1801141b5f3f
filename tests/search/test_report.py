"""What a search says it has found, against numpy."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from PIL import Image

from facm_platform.search.findings import Confirmed, Findings
from facm_platform.search.proposals import Study
from facm_platform.search.records import FAILED, FINISHED, STOPPED, Record
from facm_platform.search.report import gist, leaderboard, report_files
from facm_platform.search.space import parse
from facm_platform.search.trial import Trial
from facm_platform.training.config import ValidationConfig
from tests.search.conftest import SPACE, make_config

RECIPE, CONTROL, TRIAL = [10.0, 11.0, 12.0], [50.0, 60.0, 58.0], [8.0, 8.5, 9.5]
ERROR = 0.5


def record(number: int, distance: float, state: str = FINISHED, **changes: Any) -> Record:
    measured = [
        {"images_seen": images, "fid_nfe1": distance * by, "fid_nfe1_error": ERROR}
        for images, by in ((10.0, 3.0), (80.0, 1.0))
    ]
    known: dict[str, Any] = {"params": {}, "values": {}, "state": state, "measured": measured}
    return Record(**{"number": number, "name": f"s-{number:04d}", **known, **changes})


def runs(distances: list[float]) -> list[Record]:
    return [record(number, distance) for number, distance in enumerate(distances)]


def findings(folder: Path, best: list[float] = TRIAL) -> Findings:
    config = make_config(folder)
    study = Study(parse(SPACE), config.algorithm, config.objectives, 8, (), _trial)
    records = []
    for state in [FINISHED] * 5 + [STOPPED, STOPPED, FAILED]:
        trial = study.next()
        assert trial is not None
        distance = 5 + abs(math.log(trial.values["objective.lambda_fm"]))
        made = record(trial.number, distance, state, params=trial.params, values=trial.values)
        if state == STOPPED:
            made.measured.pop()
        if state == FAILED:
            made.reason = "MemoryError: all of it"
        study.ended(made)
        records.append(made)
    candidates = [
        Confirmed("recipe", {}, runs=runs(RECIPE)),
        Confirmed("no-anchor", {"objective.lambda_fm": 0.0}, runs=runs(CONTROL)),
        Confirmed("0002", {"objective.lambda_fm": 2.0}, {0.1: 9.0, 0.2: 8.0}, runs(best)),
        Confirmed("0001", {"objective.lambda_fm": 3.0}, runs=runs([9.0, 9.0, 9.1])),
    ]
    return Findings(config, records, study.study, candidates)


def _trial(number: int, params: Any, values: Any) -> Trial:
    plan: Any = None
    return Trial(number, f"s-{number:04d}", dict(params), values, plan)


def test_means_errors_and_gain(tmp_path: Path) -> None:
    found = findings(tmp_path)
    for one, distances in zip(found.candidates, (RECIPE, CONTROL, TRIAL), strict=False):
        assert one.mean("fid_nfe1") == pytest.approx(np.mean(distances))
        wanted = np.hypot(np.std(distances, ddof=1) / np.sqrt(3), ERROR)
        assert one.error("fid_nfe1", "fid_nfe1_error") == pytest.approx(wanted)
    assert found.winner.name == "0002"
    gain, joint = found.gain(found.winner, found.recipe)
    assert gain == pytest.approx(np.mean(RECIPE) - np.mean(TRIAL))
    spread = np.var(RECIPE, ddof=1) / 3 + np.var(TRIAL, ddof=1) / 3 + 2 * ERROR**2
    assert joint == pytest.approx(np.sqrt(spread))
    metrics = found.metrics()
    assert metrics["winner_fid_nfe1"] == pytest.approx(np.mean(TRIAL))
    assert [metrics[f"trials_{state}"] for state in (FINISHED, STOPPED, FAILED)] == [5, 2, 1]


def test_runs_that_failed_do_not_count(tmp_path: Path) -> None:
    one = Confirmed("0001", {}, runs=[record(0, 4.0), record(1, 1.0, FAILED, reason="lost")])
    assert one.mean("fid_nfe1") == 4.0
    # One run shows no spread, and so nothing is better than it for certain.
    assert one.error("fid_nfe1", "fid_nfe1_error") == math.inf
    found = findings(tmp_path)
    nothing = Confirmed("0003", {}, runs=[record(0, 1.0, FAILED, reason="lost")])
    found = replace(found, candidates=[*found.candidates, nothing])
    assert nothing.mean("fid_nfe1") == math.inf
    assert found.winner.name == "0002"
    assert "| trial 3 | inf ± inf | lost |" in report_files(found, "")["report.md"].decode()


@pytest.mark.parametrize(
    ("best", "verdict"),
    [
        (
            TRIAL,
            "**The winner is better than the recipe by more than their joint standard error.**",
        ),
        ([10.0, 10.5, 11.0], "**The winner is not better than the recipe by more than their"),
    ],
)
def test_the_report_says_whether_it_was_noise(
    tmp_path: Path, best: list[float], verdict: str
) -> None:
    found = findings(tmp_path, best)
    found = replace(found, candidates=found.candidates[:3])
    report = report_files(found, "the plan")["report.md"].decode()
    assert verdict in report
    gain = 11 - np.mean(best)
    assert f"fid_nfe1 lower by {gain:.2f}, joint standard error" in report
    assert "| no-anchor | 56.00 ± " in report
    assert "**trial 2**: 0.1 gives 9.00, 0.2 gives 8.00" in report
    assert "8 trials (5 finished, 2 stopped, 1 failed)" in report
    assert "trial 7 failed: MemoryError: all of it" in report
    assert "training seeds 1, 2, 3, over 100 samples" in report
    assert "the plan" in report


def test_importance_is_of_what_matters(tmp_path: Path) -> None:
    def value(trial: optuna.Trial) -> float:
        weight = trial.suggest_float("objective.lambda_fm", 1e-3, 10, log=True)
        trial.suggest_float("objective.p", 0, 1)
        return abs(math.log(weight))

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(value, 200)
    found = replace(findings(tmp_path), study=study).importances()
    assert found["objective.lambda_fm"] > 5 * found["objective.p"]


def test_the_pareto_front() -> None:
    points = np.random.default_rng(1).random((40, 2))
    records = []
    for number, (first, second) in enumerate(points):
        made = record(number, first)
        made.measured[-1] |= {"fid_nfe2": second, "fid_nfe2_error": 0.1}
        records.append(made)
    config = make_config(
        Path("/nowhere"),
        space={"objective": {"p": {"uniform": [0, 1]}}},
        objectives=("fid_nfe1", "fid_nfe2"),
        validation=ValidationConfig(features_uri="f", samples=100, nfe=(1, 2)),
        stopping=replace(make_config(Path("/nowhere")).stopping, kind="none"),
    )
    study = optuna.create_study(directions=["minimize"] * 2)
    for point in points:
        study.add_trial(optuna.trial.create_trial(values=list(point)))
    candidates = [Confirmed(name, {}, runs=records[:2]) for name in ("recipe", "0001")]
    found = Findings(config, records, study, candidates)
    assert {r.number for r in found.front()} == {trial.number for trial in study.best_trials}
    assert 1 < len(found.front()) < 40
    files = report_files(found, "")
    assert "## Pareto front" in files["report.md"].decode()
    assert "pareto.png" in files


def test_files_of_a_report(tmp_path: Path) -> None:
    found = findings(tmp_path)
    files = report_files(found, "")
    plots = {name for name in files if name.endswith(".png")}
    kinds = ("confirmed", "trials", "heatmap", "parallel", "importance")
    assert plots == {f"{kind}.png" for kind in kinds}
    for name in plots:
        assert f"![{name.removesuffix('.png')}]({name})" in files["report.md"].decode()
        image = Image.open(io.BytesIO(files[name]))
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20
    rows = list(csv.DictReader(io.StringIO(files["trials.csv"].decode())))
    assert [row["state"] for row in rows] == [one.state for one in found.trials]
    for row, one in zip(rows, found.trials, strict=True):
        assert float(row["objective.lambda_fm"]) == one.values["objective.lambda_fm"]
        # Empty where the trial has no such value.
        mean = one.values.get("objective.times.mean", "")
        assert row["objective.times.mean"] == str(mean)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("ValueError: no", "ValueError: no"),
        (
            "WorkerGroupError: failed:\n[Rank 1 Error Snippet]:\nTraceback (most\n  x\nE: why\n",
            "E: why",
        ),
        (
            "X: failed:\n[Rank 0 Error Snippet]:\nA check failed.\npid",
            "[Rank 0 Error Snippet]: A check failed.",
        ),
        ("", ""),
    ],
)
def test_the_gist_of_an_error(reason: str, line: str) -> None:
    assert gist(reason) == line


def test_the_leaderboard_is_in_order(tmp_path: Path) -> None:
    found = findings(tmp_path)
    lines = leaderboard(found.config, found.trials).splitlines()
    assert lines[2] == "8 trials: 5 finished, 2 stopped, 1 failed"
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    order = [int(number) for number in rows if number.isdigit()]
    finished = sorted((r for r in found.trials if r.finished), key=lambda r: r.last["fid_nfe1"])
    stopped = sorted(found.trials[5:7], key=lambda r: r.last["fid_nfe1"])
    assert order == [r.number for r in (*finished, *stopped)]
