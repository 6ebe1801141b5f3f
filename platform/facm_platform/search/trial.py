"""One trial: a distillation of its own, which tells what is measured while it trains."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from ray import tune

from facm_platform.config import JobResult
from facm_platform.search.space import Values
from facm_platform.training.distill import DistillPlan
from facm_platform.training.validation import measured

IMAGES, FINISHED, FAILED = "images_seen", "finished", "failed"
"""What a trial reports beside distances: of how many images they are; how it ended."""
SPEED = "images_per_second"

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
    """

    number: int
    name: str
    params: dict[str, Any]
    values: Values
    plan: DistillPlan


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
    """
    trial: Trial = config["trial"]
    plan = trial.plan
    work = _Work(plan, config["tags"])
    work.start()
    told = 0
    while work.is_alive():
        work.join(_LOOK_SECONDS)
        for one in measured(plan.folder_uri, told):
            if one[IMAGES] < plan.config.train.total_images:
                tune.report(one)
                told += 1
    if work.failure is not None:
        tune.report({FAILED: f"{type(work.failure).__name__}: {work.failure}"})
        return
    assert work.result is not None
    rest = measured(plan.folder_uri, told)
    if not rest:
        tune.report({FAILED: "it ended without a measurement of its last checkpoint"})
        return
    tune.report(rest[-1] | {FINISHED: True, SPEED: work.result.metrics[SPEED]})
