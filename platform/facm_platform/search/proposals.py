"""Who says which trial is next: Optuna, or a list."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from facm_platform.search.config import GRID, NSGA2, AlgorithmConfig
from facm_platform.search.records import FAILED, FINISHED, STOPPED, Record
from facm_platform.search.space import Space, Values
from facm_platform.search.trial import IMAGES, Trial

Make = Callable[[int, Mapping[str, Any], Values], Trial]
"""(number, params, values) -> the trial."""

STATES = {
    FINISHED: TrialState.COMPLETE,
    STOPPED: TrialState.PRUNED,
    FAILED: TrialState.FAIL,
}
"""How Optuna calls the end of a trial."""
# Between the seeds of two proposals.
_STRIDE = 10_007


class Proposals(Protocol):
    """Gives trials, and hears what became of them."""

    def next(self) -> Trial | None:
        """The next one; None when there are no more."""

    def ended(self, record: Record) -> None:
        """What became of one, in whatever order."""


class Listed:
    """Trials that are known before."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._trials: Iterator[Trial] = iter(trials)

    def next(self) -> Trial | None:
        return next(self._trials, None)

    def ended(self, record: Record) -> None:
        """They are what they are."""


class Study:
    """Optuna's proposals.

    Each has a sampler of its own, seeded by its number: what is proposed depends on the trials that
    have ended, and not on how often the search was interrupted.

    Args:
        space: What is varied.
        algorithm: Which sampler.
        objectives: Metrics that are to be small.
        trials: How many; None for the whole grid.
        earlier: Records of an interrupted search, in order: they are proposed again.
        make: The trial of a proposal.
    """

    def __init__(
        self,
        space: Space,
        algorithm: AlgorithmConfig,
        objectives: Sequence[str],
        trials: int | None,
        earlier: Iterable[Record],
        make: Make,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(directions=["minimize"] * len(objectives))
        self._space, self._algorithm, self._objectives = space, algorithm, objectives
        self._trials = min(space.size, math.inf if trials is None else trials)
        self._make = make
        self._asked: dict[str, optuna.Trial] = {}
        if algorithm.kind == GRID:
            known: Iterable[dict[str, Any]] = space.grid()
        else:
            known = (record.params for record in earlier)
        for params in known:
            self.study.enqueue_trial(params)

    def next(self) -> Trial | None:
        number = len(self.study.trials) - self._waiting()
        if number >= self._trials:
            return None
        self.study.sampler = _sampler(self._algorithm, number)
        asked = self.study.ask()
        values = self._space.suggest(asked)
        trial = self._make(number, asked.params, values)
        self._asked[trial.name] = asked
        return trial

    def ended(self, record: Record) -> None:
        asked = self._asked[record.name]
        if len(self._objectives) == 1:
            for one in record.measured:
                asked.report(one[self._objectives[0]], int(one[IMAGES]))
        found = [record.last[name] for name in self._objectives] if record.finished else None
        self.study.tell(asked, found, state=STATES[record.state])

    def _waiting(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _sampler(algorithm: AlgorithmConfig, number: int) -> optuna.samplers.BaseSampler:
    seed = algorithm.seed * _STRIDE + number
    if algorithm.kind == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of `group`
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=algorithm.startup_trials,
                multivariate=True,
                group=True,  # conditional dimensions
                constant_liar=True,  # trials run side by side
            )
    if algorithm.kind == NSGA2:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=algorithm.startup_trials)
    return optuna.samplers.RandomSampler(seed=seed)
