"""Ray Tune's schedulers, fitted to trials: who stops, and who goes on from another's checkpoint."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any, cast

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from facm_platform.search.config import PBT, SearchConfig
from facm_platform.search.records import Record
from facm_platform.search.space import Dimension, Space
from facm_platform.search.trial import FAILED, FINISHED, IMAGES, VALUES


def scheduler_of(config: SearchConfig, space: Space) -> TrialScheduler:
    """The one that the search wants."""
    if config.algorithm.kind == PBT:
        return Population(config, space)
    if config.stopping.kind == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    return Halving(config)


class Halving(AsyncHyperBandScheduler):
    """Ray Tune's ASHA, which stops a trial only if a slightly better one would be stopped too.

    Slightly: by `z` standard errors of its distance.
    """

    def __init__(self, config: SearchConfig) -> None:
        stopping = config.stopping
        super().__init__(
            time_attr=IMAGES,
            metric=config.objective,
            mode="min",
            # The end of a trial is no rung.
            max_t=max(config.budget.images - 1, stopping.first_images),
            grace_period=stopping.first_images,
            reduction_factor=stopping.reduction_factor,
            brackets=stopping.brackets if stopping.kind == "hyperband" else 1,
            stop_last_trials=False,
        )
        self._distance, self._error, self._z = config.objective, config.error, stopping.z

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Deal the trial out to a bracket, by its number: the same one when it is resumed."""
        number = trial.config["trial"].number
        self._trial_info[trial.trial_id] = self._brackets[number % len(self._brackets)]

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Stop or go on."""
        if result.get(FINISHED) or result.get(FAILED):
            return TrialScheduler.CONTINUE
        before = copy.deepcopy(self._trial_info[trial.trial_id])
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        lowest = result[self._distance] - self._z * result[self._error]
        return before.on_result(trial, result[IMAGES], -lowest)

    def replay(self, record: Record) -> None:
        """Put a trial that has ended on the rungs that it was on."""
        bracket = self._brackets[record.number % len(self._brackets)]
        for one in record.measured:
            bracket.on_result(_named(record.name), int(one[IMAGES]), -one[self._distance])


class Population(PopulationBasedTraining):
    """Ray Tune's PBT; values stay in their ranges, and a trial that has ended goes on from nobody.

    Args:
        config: Of the search.
        space: Of which every dimension may change on the way.
    """

    def __init__(self, config: SearchConfig, space: Space) -> None:
        self._ranges = {d.key: d.ends for d in space.dimensions if d.drawn is None}
        random.seed(config.algorithm.seed)  # whence it draws
        super().__init__(
            time_attr=IMAGES,
            metric=config.objective,
            mode="min",
            perturbation_interval=config.stopping.first_images,
            hyperparam_mutations={VALUES: {d.key: _domain(d) for d in space.dimensions}},
            custom_explore_fn=self._within,
            require_attrs=False,
            log_config=False,
        )

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        """Take it into the population.

        PBT refuses to work beside a search algorithm, which would learn from values that it
        changes. Ours proposes at random, and learns nothing.
        """
        super().on_trial_add(cast(Any, SimpleNamespace(search_alg=None)), trial)

    def on_trial_result(
        self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        """Go on, or from another's checkpoint."""
        if result.get(FINISHED) or result.get(FAILED):
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def _within(self, config: dict[str, Any]) -> dict[str, Any]:
        for key, (low, high) in self._ranges.items():
            config[VALUES][key] = min(max(config[VALUES][key], low), high)
        return config


def _domain(dimension: Dimension) -> Any:
    """Whence Tune draws anew; values of a list change to their neighbours."""
    if dimension.drawn is None:
        low, high = dimension.ends
        return tune.loguniform(low, high) if dimension.log else tune.uniform(low, high)
    ends = dimension.ends
    return list(ends) if len(ends) == len(dimension.drawn) else list(dimension.drawn)


def _named(name: str) -> TuneTrial:
    """As much of a trial as a bracket asks for."""
    return cast(TuneTrial, SimpleNamespace(trial_id=name))
