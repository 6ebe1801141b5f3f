"""Searches on a cluster of their own: killed and gone on with, with trials that fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster

from facm_platform.search.report import gist
from tests.conftest import NO_DASHBOARD
from tests.jobs.conftest import last_line
from tests.jobs.driver import Driver
from tests.search.conftest import SPACE
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

Found = dict[str, Any]


class SearchSite:
    """A cluster with room for three small trials at once."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        recipe = {
            "run": {"name": "base"},
            "data": {"uri": world.data},
            "teacher": {"uri": world.teacher},
            "train": {"global_batch_size": 8, "learning_rate": 1e-3, "log_images": 16},
            "workers": {"max": 1, "cpus": 0.5, "max_failures": 0},
        }
        (folder / "recipe.yaml").write_text(OmegaConf.to_yaml(recipe))
        self.search: Found = {
            "run": {"storage_uri": str(folder / "runs")},
            "recipe": str(folder / "recipe.yaml"),
            "space": SPACE,
            "validation": {"features_uri": world.features, "samples": 100},
            "budget": {"images": 64, "trials": 4},
            "algorithm": {"kind": "random"},
            "stopping": {"kind": "none", "first_images": 32},
            "confirm": {"samples": 100, "seeds": [1, 2], "top": 1, "sigma_rels": [0.05, 0.2]},
        }
        head = {"num_cpus": 4} | NO_DASHBOARD
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.drivers: list[Driver] = []

    def start(self, name: str, *options: str, **changes: Any) -> Driver:
        file = self.folder / f"{name}.yaml"
        search = OmegaConf.merge(self.search, {"run": {"name": name}}, changes)
        if "space" in changes:
            search.space = changes["space"]
        file.write_text(OmegaConf.to_yaml(search))
        arguments = ["--recipe", str(file), *options]
        self.drivers.append(Driver(arguments, self.cluster.address, self.folder, "search"))
        return self.drivers[-1]

    def distill(self, *arguments: str) -> Driver:
        self.drivers.append(Driver([*arguments], self.cluster.address, self.folder))
        return self.drivers[-1]

    def records(self, name: str, part: str = "trials") -> list[Found]:
        files = sorted((self.folder / "runs" / name / part).iterdir())
        return [json.loads(file.read_text()) for file in files]

    def stop(self) -> None:
        for driver in self.drivers:
            driver.end()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, world: World) -> Iterator[SearchSite]:
    site = SearchSite(tmp_path_factory.mktemp("search"), world)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def undisturbed(site: SearchSite) -> Found:
    """The result of a search, and its records."""
    driver = site.start("plain")
    driver.finish()
    found = {part: site.records("plain", part) for part in ("trials", "confirming")}
    return {"result": last_line(driver.output), **found}


def outcomes(records: list[Found]) -> list[tuple[Any, ...]]:
    return [(one["values"], one["state"], one["measured"]) for one in records]


def test_a_killed_search_goes_on_to_the_same_result(site: SearchSite, undisturbed: Found) -> None:
    first = site.start("killed")
    first.wait_until(lambda: "killed-0000 finished" in first.output)
    first.end()
    before = {one["name"]: one for one in site.records("killed")}
    ended = {name for name, one in before.items() if one["state"] == "finished"}
    assert 0 < len(ended) < 4

    again = site.start("killed", "--resume")
    again.finish()
    records = site.records("killed")
    assert outcomes(records) == outcomes(undisturbed["trials"])
    assert len(records) == 4
    for one in records:
        begun = f"{one['name']} running" in again.output
        assert begun == (one["name"] not in ended)
        if one["name"] in ended:
            assert one == before[one["name"]]
    confirming = site.records("killed", "confirming")
    assert outcomes(confirming) == outcomes(undisturbed["confirming"])
    assert last_line(again.output)["metrics"] == undisturbed["result"]["metrics"]


def test_trials_are_runs_under_that_of_the_search(site: SearchSite, undisturbed: Found) -> None:
    client = MlflowClient(f"sqlite:///{site.folder / 'runs' / 'mlflow.db'}")
    parent = client.get_run(undisturbed["result"]["run_id"])
    assert parent.data.metrics == undisturbed["result"]["metrics"]
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"report.md", "winner.yaml", "leaderboard.md", "trials.csv", "trials.png"} <= artifacts
    clause = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}'"
    runs = {run.info.run_name: run for run in client.search_runs(["1"], clause)}
    records = [*undisturbed["trials"], *undisturbed["confirming"]]
    assert runs.keys() == {one["name"] for one in records}
    for one in records:
        history = client.get_metric_history(runs[one["name"]].info.run_id, "fid_nfe1")
        told = [(metric.step, metric.value) for metric in history]
        assert told == [(got["images_seen"], got["fid_nfe1"]) for got in one["measured"]]
        assert runs[one["name"]].info.status == "FINISHED"


def test_the_winner_is_a_recipe_of_distill(site: SearchSite, undisturbed: Found) -> None:
    file = site.folder / "runs" / "plain" / "winner.yaml"
    site.distill("--recipe", str(file)).finish()
    (measured,) = sorted((site.folder / "runs" / "plain-winner" / "validation").glob("0*.json"))
    got = json.loads(measured.read_text())
    best = min(undisturbed["trials"], key=lambda one: one["measured"][-1]["fid_nfe1"])
    name = f"{best['name']}-seed1"
    (same,) = (one for one in undisturbed["confirming"] if one["name"] == name)
    assert abs(got["fid_nfe1"] - same["measured"][-1]["fid_nfe1"]) < got["fid_nfe1_error"]


def test_trials_that_fail_are_recorded_and_the_search_ends(site: SearchSite) -> None:
    rates = [1e-3, 1e30, 2e-3, 3e-3]
    driver = site.start(
        "failing",
        space={
            "train": {"learning_rate": {"choice": rates}, "max_skipped_in_a_row": 2},
        },
        budget={"images": 64, "trials": None, "concurrent": 1},
        algorithm={"kind": "grid"},
        workers={"max": 2, "cpus": 0.25, "max_failures": 0, "stall_seconds": 20},
    )
    worker_of(driver, "failing-0002").suspend()
    hog = worker_of(driver, "failing-0003")
    used = hog.memory_info().vms
    hog.rlimit(psutil.RLIMIT_AS, (used + (1 << 20), used + (1 << 20)))
    driver.finish()
    records = site.records("failing")
    assert [one["values"]["train.learning_rate"] for one in records] == rates
    assert [one["state"] for one in records] == ["finished", "failed", "failed", "failed"]
    report = (site.folder / "runs" / "failing" / "report.md").read_text()
    assert "behind are the ranks [1]" in driver.output
    # What runs out first depends: an allocation, a thread's stack, or the process dies.
    out_of_memory = r"memory|start new thread|MemoryError|died|health check"
    reasons = ("steps in a row were not finite", r"Rank 0.*health check failed", out_of_memory)
    for one, reason in zip(records[1:], reasons, strict=True):
        assert re.search(reason, gist(one["reason"]))
        assert f"trial {one['number']} failed: {gist(one['reason'])}" in report


def test_what_a_population_finds_is_a_recipe(site: SearchSite) -> None:
    driver = site.start(
        "population",
        space={
            "objective": {"lambda_fm": {"log_uniform": [1e-3, 10]}},
            "train": {"learning_rate": {"choice": [1e-4, 1e-3, 1e-2]}},
        },
        budget={"images": 64, "trials": 3},
        algorithm={"kind": "pbt"},
        stopping={"first_images": 16},
        confirm={"sigma_rels": []},
    )
    driver.finish()
    records = site.records("population")
    assert [one["state"] for one in records] == ["finished"] * 3
    changed = [one for one in records if "stages" in one["values"]]
    assert changed
    for one in changed:
        counts = [stage["from_images"] for stage in one["values"]["stages"]]
        assert counts == sorted(set(counts))
        assert set(counts) <= {16, 32, 48}
        assert len(one["runs"]) > 1

    # Trained by it from the start, a student is as good to the last digit.
    one = changed[0]
    recipe = OmegaConf.load(site.folder / "recipe.yaml")
    for key, value in one["values"].items():
        OmegaConf.update(recipe, key, value)
    validation = site.search["validation"]
    length = {"images": 64, "checkpoint_images": 64}
    run = {"name": "by-recipe", "storage_uri": str(site.folder / "runs")}
    recipe = OmegaConf.merge(recipe, {"run": run, "train": length, "validation": validation})
    file = site.folder / "by-recipe.yaml"
    file.write_text(OmegaConf.to_yaml(recipe))
    site.distill("--recipe", str(file)).finish()
    (measured,) = (site.folder / "runs" / "by-recipe" / "validation").glob("0*.json")
    assert json.loads(measured.read_text()) == one["measured"][-1]


def worker_of(driver: Driver, trial: str) -> psutil.Process:
    """The process of the second rank of a trial, once it has told."""
    driver.wait_until(lambda: f"{trial} running" in driver.output)
    start = driver.output.index(f"{trial} running")
    pattern = r"worker 1 of 2: process (\d+)"
    driver.wait_until(lambda: re.search(pattern, driver.output[start:]) is not None)
    (first, *_) = re.findall(pattern, driver.output[start:])
    return psutil.Process(int(first))
