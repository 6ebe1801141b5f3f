"""What a search refuses before it starts, and what it says it would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from facm_core.errors import InvalidInputError
from facm_platform.config import load_config
from facm_platform.search import SearchConfig, SearchPlan, prepare
from facm_platform.search.plan import IDENTITY, identity
from facm_platform.tracking import TrackingConfig, connect_store, open_run
from tests.search.conftest import SPACE
from tests.world import World

Search = dict[str, Any]


def given(world: World, root: Path, **changes: Any) -> Search:
    """A search file's content."""
    recipe = root / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(OmegaConf.to_yaml(OmegaConf.from_dotlist(world.options("base", root))))
    search: Search = {
        "run": {
            "name": "s",
            "storage_uri": str(root / "runs"),
            "tracking": {"uri": f"sqlite:///{root}/mlflow.db"},
        },
        "recipe": str(recipe),
        "space": SPACE,
        "validation": {"features_uri": world.features, "samples": 100},
        "budget": {"images": 80, "trials": 6},
        "stopping": {"first_images": 16},
        "confirm": {"samples": 100, "seeds": [1, 2]},
    }
    return search | changes


def planned(search: Search, root: Path, *overrides: str) -> SearchPlan:
    file = root / "search.yaml"
    file.write_text(OmegaConf.to_yaml(search))
    return prepare(load_config(SearchConfig, str(file), overrides))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"objective": {"lambda_fmm": {"uniform": [0, 1]}}}},
            "space.objective.lambda_fmm = 0.0: unknown key, did you mean 'objective.lambda_fm'?",
        ),
        ({"space": {"objective": {"p": {"uniform": [1, 1]}}}}, "space.objective.p = [1, 1]: an em"),
        ({"space": {"objective": {"p": {"uniform": [-1, 1]}}}}, "space.objective.p = -1.0: not po"),
        ({"space": {"objective": {"p": 0.5}}}, "space = {'objective': {'p': 0.5}}: nothing varies"),
        (
            {"space": {"objective": {"times": {"kind": {"choice": ["uniform", "normal"]}}}}},
            "space.objective.times.kind = 'normal': unknown choice",
        ),
        (
            {"space": {"train": {"images": {"integer": [8, 16]}}}},
            "space.train.images = 'varied'",
        ),
        (
            {"space": {"workers": {"max": {"integer": [1, 2]}}}},
            "space.workers.max = 'varied'",
        ),
        (
            {"space": {"train": {"export_sigma_rel": {"uniform": [0.1, 0.2]}}}},
            "space.train.export_sigma_rel = 'varied': widths need no training of their own. Use ",
        ),
        (
            {"space": {"train": {"global_batch_size": {"choice": [1, 8]}}}},
            "space.train.global_batch_size = 1: less than a row for each of workers.max = 2",
        ),
        (
            {"objectives": ["fid_nfe2"]},
            "objectives = 'fid_nfe2': no trial would report it: validation.nfe gives fid_nfe1",
        ),
        ({"objectives": ["loss"]}, "objectives = 'loss': no trial would report it"),
        ({"objectives": []}, "objectives = (): not one or two different ones"),
        (
            {"budget": {"images": 8, "trials": 6}},
            "budget.images = 8: a trial would end ",
        ),
        ({"budget": {"images": 80}}, "budget.trials = None: tpe proposes trials without end"),
        ({"budget": {"images": 80, "trials": 0}}, "budget.trials = 0: below 1"),
        ({"algorithm": {"kind": "grid"}}, "algorithm.kind = 'grid': the space has ranges"),
        ({"algorithm": {"kind": "nsga2"}}, "algorithm.kind = 'nsga2': it is for two objectives"),
        ({"algorithm": {"kind": "bayes"}}, "algorithm.kind = 'bayes': unknown choice"),
        ({"algorithm": {"kind": "pbt"}}, "stopping.kind = 'asha': pbt does not stop trials"),
        (
            {"space": {"objective": {"p": {"choice": [0.5, 1]}}}},
            "budget.trials = 6: the space has 2 different ones",
        ),
        ({"validation": {"features_uri": "/nowhere"}}, "validation.features_uri = '/nowhere'"),
        ({"confirm": {"samples": 101}}, "confirm.samples = 101: not a multiple of the 10 classes"),
        ({"confirm": {"samples": 100, "seeds": [1]}}, "confirm.seeds = (1,): no two or more seeds"),
        (
            {"controls": {"none": {"objective.lambda": 0}}},
            "controls.none.objective.lambda = 0: ",
        ),
        ({"controls": {"none": 0}}, "controls.none = 0: no values of a recipe"),
        ({"controls": {"a b": {}}}, "controls = 'a b': not usable as a name"),
        ({"recipe": "nothing"}, "--recipe = 'nothing': there is no such recipe"),
        ({"run": {"name": "a/b"}}, "run.name = 'a/b': not usable as a name"),
    ],
)
def test_bad_input_is_refused(world: World, tmp_path: Path, changes: Search, message: str) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        planned(given(world, tmp_path, **changes), tmp_path)
    assert not (tmp_path / "runs").exists()


def test_two_objectives_are_not_stopped(world: World, tmp_path: Path) -> None:
    search = given(world, tmp_path, objectives=["fid_nfe1", "fid_nfe2"])
    search["validation"]["nfe"] = [1, 2]
    with pytest.raises(InvalidInputError, match=r"stopping.kind = 'asha': with two objectives"):
        planned(search, tmp_path)
    search["stopping"]["kind"] = "none"
    assert planned(search, tmp_path).config.objectives == ("fid_nfe1", "fid_nfe2")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (SPACE, "space = ['objective.times']: a population learns of its best"),
        (
            {"train": {"global_batch_size": {"choice": [8, 16]}}},
            "space.stages.0 = 'train.global_batch_size': it cannot change in mid-run",
        ),
    ],
)
def test_what_a_population_cannot_vary(
    world: World, tmp_path: Path, space: Search, message: str
) -> None:
    search = given(world, tmp_path, space=space, algorithm={"kind": "pbt"})
    search["stopping"]["kind"] = "none"
    search["budget"]["trials"] = 2
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        planned(search, tmp_path)
    search["space"] = {"objective": {"p": {"uniform": [0.5, 1]}}}
    config = planned(search, tmp_path).trial(0, {}, {"objective.p": 0.5}).plan.config
    assert (config.train.checkpoint_images, config.train.keep_checkpoints) == (16, 80)


def test_the_name_of_a_search(world: World, tmp_path: Path) -> None:
    search = given(world, tmp_path)
    with pytest.raises(InvalidInputError, match=r"there is no search of this name to go on with"):
        planned(search, tmp_path, "resume=true")
    begun = planned(search, tmp_path)
    kept = tmp_path / "runs" / "s" / IDENTITY
    kept.parent.mkdir(parents=True)
    kept.write_text(identity(begun.config))
    with pytest.raises(InvalidInputError, match=r"there is a search of this name.*Add --resume"):
        planned(search, tmp_path)
    planned(search, tmp_path, "resume=true", "budget.trials=9", "budget.concurrent=1")
    with pytest.raises(InvalidInputError, match=r'(?s)-    "seed": 0.*\+    "seed": 1'):
        planned(search, tmp_path, "resume=true", "algorithm.seed=1")


def test_the_plan_tells_what_would_run_and_what_it_costs(world: World, tmp_path: Path) -> None:
    search = given(world, tmp_path, controls={"no-anchor": {"objective.lambda_fm": 0.0}})
    plan = planned(search, tmp_path)
    text = plan.describe()
    assert "hours: not known before a distillation of this teacher" in text
    assert "objective.lambda_fm: 0.001 to 10, by logarithm" in text
    assert "objective.times.mean: -1 to 1 (where objective.times: logit_normal)" in text
    assert "asha: one in 3 goes on after 16, 48" in text
    # The recipe, the control and three trials, on two seeds.
    for line in (r"trials +6 +480", r"confirming runs +10 +800", r"together +16 +1,280"):
        assert re.search(f"{line}\n", text)

    store = connect_store(TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)
    tags = {"teacher_sha256": plan.base.teacher.sha256}
    for speed in (9.0, 4.0):
        with open_run(store, "d", job="distill", config=plan.base.config, tags=tags) as run:
            run.log_metrics({"images_per_second": speed}, images_seen=80)
    plan = planned(search, tmp_path)
    # 480 images at 4 images/s by two workers.
    assert re.search(r"trials +6 +480 +0\.07\n", plan.describe())
    assert "at 4 images/s, as in the last distillation of this teacher" in plan.describe()
    with pytest.raises(InvalidInputError, match=r"budget.hours = 0.01: one trial takes 0.0111"):
        planned(search, tmp_path, "budget.hours=0.01")
    assert json.loads(identity(plan.config))["budget"] == {"images": 80}


def test_trials_are_as_long_as_the_search_wants(world: World, tmp_path: Path) -> None:
    plan = planned(given(world, tmp_path), tmp_path)
    values = {"objective.lambda_fm": 1e-05, "objective.times.kind": "uniform"}
    trial = plan.trial(3, {}, values)
    config = trial.plan.config
    assert config.objective is not None
    assert (config.objective.lambda_fm, config.objective.times.kind) == (1e-05, "uniform")
    assert (config.train.images, config.train.checkpoint_images, config.train.seed) == (80, 16, 0)
    assert trial.plan.folder_uri == str(tmp_path / "runs" / "s" / "runs" / "s-0003")
    confirming = plan.confirming("c", values, 0, seed=2).plan
    assert confirming.config.train.seed == 2
    assert confirming.config.train.checkpoint_images == 80
    assert confirming.task("", "").validation == confirming.config.validation

    # What jobs/distill.py makes of the winner's file is that run, in another place.
    winner = plan.recipe(values, seed=2)
    same = {"train", "objective", "workers", "mean_flow", "scm"}
    for name in same:
        assert getattr(winner, name) == getattr(confirming.config, name)
    assert winner.run.name == "s-winner"
