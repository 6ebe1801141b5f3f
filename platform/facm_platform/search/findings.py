"""What a search has found: who is best, by how much, and what mattered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState

from facm_platform.search.config import SearchConfig
from facm_platform.search.records import Record
from facm_platform.search.space import Values


@dataclass
class Confirmed:
    """A recipe that was trained on several seeds.

    Attributes:
        name: ``recipe``, a control's, or the number of a trial.
        values: By which it differs from the recipe.
        widths: Distance of its trial by the width of the average.
        runs: One for each seed.
    """

    name: str
    values: Values
    widths: dict[float, float] = field(default_factory=dict)
    runs: list[Record] = field(default_factory=list)

    @property
    def is_trial(self) -> bool:
        """Whether it came of a proposal."""
        return self.name.isdigit()

    def distances(self, metric: str) -> list[float]:
        """Of its runs that finished."""
        return [run.last[metric] for run in self.runs if run.finished]

    def mean(self, metric: str) -> float:
        """Over its seeds; infinite if none has finished."""
        found = self.distances(metric)
        return fmean(found) if found else math.inf

    def error(self, metric: str, error: str) -> float:
        """Standard error of that mean: the spread of the seeds and that of the samples.

        All runs are measured with the same noise, so that the second does not shrink with their
        number. Infinite for fewer than two runs, which show no spread.
        """
        found = self.distances(metric)
        if len(found) < 2:
            return math.inf
        of_samples = fmean(run.last[error] ** 2 for run in self.runs if run.finished)
        return math.sqrt(variance(found) / len(found) + of_samples)


@dataclass(frozen=True)
class Findings:
    """Of one search.

    Attributes:
        config: What was asked for.
        trials: Records of all trials, in their order.
        study: Optuna's view of them.
        candidates: What was trained on several seeds: the recipe first, then controls and trials.
    """

    config: SearchConfig
    trials: Sequence[Record]
    study: optuna.Study
    candidates: Sequence[Confirmed]

    @property
    def recipe(self) -> Confirmed:
        """As it was given."""
        return self.candidates[0]

    @property
    def winner(self) -> Confirmed:
        """The best of the trials, over its seeds."""
        of_trials = [candidate for candidate in self.candidates if candidate.is_trial]
        return min(of_trials, key=lambda one: one.mean(self.config.objective))

    def gain(self, one: Confirmed, other: Confirmed) -> tuple[float, float]:
        """By how much `one` is better than `other`, and the joint standard error of that."""
        metric, error = self.config.objective, self.config.error
        difference = other.mean(metric) - one.mean(metric)
        return difference, math.hypot(one.error(metric, error), other.error(metric, error))

    def importances(self) -> dict[str, float]:
        """Share of the spread of the finished trials that each dimension of all of them explains.

        By PED-ANOVA (arXiv 2304.10255); empty for fewer than four trials.
        """
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(finished) < 4:
            return {}
        with warnings.catch_warnings():
            # That low values are wanted, and that some choices have few trials.
            warnings.simplefilter("ignore")
            return get_param_importances(
                self.study,
                evaluator=PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )

    def front(self) -> list[Record]:
        """Finished trials than which no other is better in every objective (Pareto)."""
        finished = [record for record in self.trials if record.finished]
        return [one for one in finished if not any(self._beats(other, one) for other in finished)]

    def metrics(self) -> dict[str, float]:
        """Flat numbers for MLflow."""
        metric, error = self.config.objective, self.config.error
        found = {f"winner_{metric}": self.winner.mean(metric)}
        found |= {f"winner_{metric}_error": self.winner.error(metric, error)}
        found |= {f"recipe_{metric}": self.recipe.mean(metric)}
        gain, joint = self.gain(self.winner, self.recipe)
        found |= {"gain": gain, "gain_error": joint}
        for state in ("finished", "stopped", "failed"):
            found[f"trials_{state}"] = float(sum(r.state == state for r in self.trials))
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _beats(self, one: Record, other: Record) -> bool:
        pairs = [(one.last[name], other.last[name]) for name in self.config.objectives]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
