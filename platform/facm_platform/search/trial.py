"""One trial: a distillation of its own, which tells what is measured while it trains."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from facm_platform.config import JobResult, revised
from facm_platform.search.space import Values
from facm_platform.storage import join
from facm_platform.training.distill import DistillPlan
from facm_platform.training.validation import measured

IMAGES, FINISHED, FAILED = "images_seen", "finished", "failed"
"""What a trial reports beside distances: of how many images they are; how it ended."""
SPEED, PLACE = "images_per_second", "place"
VALUES = "values"
"""Of the config that Tune gives a trial: its values now, where they change on the way."""

_PLACE_FILE = "place.json"
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Trial:
    """A distillation that the search wants.

    Attributes:
        number: In the order of the proposals, from 0.
        name: Of its run.
        params: The proposal, as the chooser made it.
        values: The same, as values of the recipe.
        plan: The distillation.
        varied: Those of `values` that are to change on the way.
    """

    number: int
    name: str
    params: dict[str, Any]
    values: Values
    plan: DistillPlan
    varied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a trial was when it measured: from there it, or another one, goes on.

    Attributes:
        run: Name of the run.
        checkpoint_uri: Its checkpoint.
        images_seen: Of that.
        values: That were in force.
        recipe: All that differs from the recipe, with the stages so far.
    """

    run: str
    checkpoint_uri: str
    images_seen: int
    values: Values
    recipe: Values


class _Work(threading.Thread):
    """A distillation; a daemon, because a trial that is stopped ends in the midst of it."""

    def __init__(self, plan: DistillPlan, tags: dict[str, str]) -> None:
        super().__init__(name="distillation", daemon=True)
        self._plan, self._tags = plan, tags
        self.result: JobResult | None = None
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._plan.execute(self._tags)
        except Exception as error:  # told by `run_trial`
            self.failure = error


def run_trial(config: dict[str, Any]) -> None:
    """Ray Tune's function: distill, and report each measurement.

    The last one is reported when the run has ended, so that no scheduler stops it before.

    Args:
        config: ``trial``; ``tags`` of its MLflow run; ``place`` to go on from, of an interrupted
            search; ``values``, where they change on the way.
    """
    trial: Trial = config["trial"]
    values: Values = config[VALUES]
    place = _place(config)
    recipe, plan = _continued(trial, values, place)
    seen = place.images_seen if place else 0
    work = _Work(plan, config["tags"])
    work.start()
    told = 0
    while work.is_alive():
        work.join(_LOOK_SECONDS)
        for one in measured(plan.folder_uri, told):
            if one[IMAGES] < plan.config.train.total_images:
                told += 1
                if one[IMAGES] > seen:
                    _report(one, plan, values, recipe)
    if work.failure is not None:
        tune.report({FAILED: f"{type(work.failure).__name__}: {work.failure}"})
        return
    assert work.result is not None
    rest = measured(plan.folder_uri, told)
    if not rest:
        tune.report({FAILED: "it ended without a measurement of its last checkpoint"})
        return
    ending = {FINISHED: True, SPEED: work.result.metrics[SPEED]}
    _report(rest[-1] | ending, plan, values, recipe)


def _report(measured: dict[str, float], plan: DistillPlan, values: Values, recipe: Values) -> None:
    images = int(measured[IMAGES])
    checkpoint_uri = join(plan.folder_uri, f"checkpoint_{images:012d}")
    place = asdict(Place(plan.config.run.name, checkpoint_uri, images, values, recipe))
    with tempfile.TemporaryDirectory(prefix="facm-place-") as folder:
        Path(folder, _PLACE_FILE).write_text(json.dumps(place))
        kept = tune.Checkpoint.from_directory(folder) if values else None
        tune.report({**measured, PLACE: json.dumps(place)}, checkpoint=kept)


def _place(config: dict[str, Any]) -> Place | None:
    """Whence to go on: Tune knows it of a trial that it has begun, the record of an earlier one."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return Place(**config["place"]) if config["place"] else None
    with checkpoint.as_directory() as folder:
        return Place(**json.loads(Path(folder, _PLACE_FILE).read_text()))


def _continued(trial: Trial, values: Values, place: Place | None) -> tuple[Values, DistillPlan]:
    """What differs from the recipe, and the distillation, of a trial that goes on from there."""
    if place is None or not values:
        return trial.values, trial.plan
    recipe, own = place.recipe, tune.get_context().get_trial_name()
    if values != place.values:
        stage = {"from_images": place.images_seen, **values}
        recipe = {**recipe, "stages": [*recipe.get("stages", ()), stage]}
    elif place.run.startswith(own):
        # It was only interrupted.
        return recipe, _named(trial.plan, recipe, place.run)
    name = f"{own}-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"
    plan = _named(trial.plan, recipe, name)
    return recipe, replace(plan, start_uri=place.checkpoint_uri)


def _named(plan: DistillPlan, recipe: Values, name: str) -> DistillPlan:
    config = revised(plan.config, {**recipe, "run.name": name})
    return replace(plan, config=config, folder_uri=join(config.run.storage_uri, name))
