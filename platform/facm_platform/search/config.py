"""What a search is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from facm_core.errors import require, require_one_of
from facm_platform.config.sections import RunConfig
from facm_platform.training.config import ValidationConfig, WorkersConfig, error_name, fid_name

GRID, NSGA2, PBT = "grid", "nsga2", "pbt"
_KINDS = ("tpe", NSGA2, "random", GRID, PBT)
_STOPPING = ("asha", "hyperband", "none")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """How much may be spent on trials; the runs that confirm the best of them come on top.

    Attributes:
        images: Length of a trial that is not stopped, and of every confirming run.
        trials: How many. None, with the algorithm ``grid``: as many as the space has.
        concurrent: How many at once, at most. None: as many as the cluster has room for.
        hours: Of all trials together, each counted once for each of its workers (GPU hours, where
            ``workers.gpu``); trials that run when they are spent are stopped. None: no limit.
    """

    images: int
    trials: int | None = None
    concurrent: int | None = None
    hours: float | None = None

    def __post_init__(self) -> None:
        for name in ("images", "trials", "concurrent"):
            value = getattr(self, name)
            fits = value is None or value >= 1
            require(fits, name, value, "below 1", "Use a whole number from 1")
        hours = self.hours
        require(hours is None or hours > 0, "hours", hours, "not positive", "Use more, or none")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Who proposes trials.

    Attributes:
        kind: Optuna's ``tpe`` (tree-structured Parzen estimator, multivariate), ``nsga2`` (for two
            objectives) or ``random``; ``grid``: all combinations of a space without ranges; or
            ``pbt``, population-based training: trials begin at random, side by side, and every
            `stopping.first_images` the worse quarter goes on from the checkpoints of the better
            one, with values that are a little different. What it finds is a schedule (``stages``
            of a recipe).
        seed: Of its draws.
        startup_trials: So many are random before ``tpe`` has an opinion; the population of
            ``nsga2``.
    """

    kind: str = "tpe"
    seed: int = 0
    startup_trials: int = 8

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, _KINDS)
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")
        startup = self.startup_trials
        require(startup >= 2, "startup_trials", startup, "below 2", "Use e.g. 8")


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """When a trial is stopped early, by what was measured at some counts of images.

    Attributes:
        kind: ``asha``: at each rung, unless it is among the best; ``hyperband``: the same, for
            trials that are dealt out to several brackets with later first rungs (with ``tpe``, this
            is BOHB's way); ``none``.
        first_images: The first rung, and the distance of a trial's checkpoints.
        reduction_factor: One in so many goes on after a rung; the next one is so much later.
        brackets: Of ``hyperband``.
        z: A trial is stopped only if it would be with a distance that is smaller by so many of its
            standard errors: it is not stopped by noise.
    """

    kind: str = "asha"
    first_images: int
    reduction_factor: int = 3
    brackets: int = 2
    z: float = 1.0

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, _STOPPING)
        for name, least in (("first_images", 1), ("reduction_factor", 2), ("brackets", 2)):
            value = getattr(self, name)
            require(value >= least, name, value, f"below {least}", f"Use {least} or more")
        require(0 <= self.z < math.inf, "z", self.z, "negative", "Use e.g. 1")


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """Runs that tell whether the best trials are good, or were lucky.

    Attributes:
        top: How many of the best trials are trained again.
        seeds: ``train.seed`` of each of their runs, of the recipe's, and of the controls'. None is
            the seed of the trials.
        samples: For each FID.
        sigma_rels: Widths of the average that are tried, without training, on the stored averages
            of each of the best trials; the best width is that of its runs. Empty: the recipe's.
    """

    top: int = 3
    seeds: tuple[int, ...] = (1, 2, 3)
    samples: int = 5000
    sigma_rels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(self.top >= 1, "top", self.top, "below 1", "Use a whole number from 1")
        different = len(self.seeds) > 1 and len(set(self.seeds)) == len(self.seeds)
        require(different, "seeds", self.seeds, "no two or more seeds", "Use e.g. [1,2,3]")
        require(min(self.seeds) >= 0, "seeds", self.seeds, "negative", "Use 0 or more")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Recipe of jobs/search.py.

    Attributes:
        run: Name and place of the search, below which its trials have their own folders.
        resume: Go on with the search of this name; else the name must be new.
        recipe: Of jobs/distill.py, which trials vary: a file of jobs/recipes, or a path.
        workers: Of every run, in place of the recipe's. None: the recipe's.
        space: What they vary; see `facm_platform.search.space`.
        objectives: What is to be small: one or two of ``fid_nfe1``, ``fid_nfe2``, ... The first one
            decides who is stopped and who is best.
        validation: How a trial is measured: same noise, same labels for all.
        budget: How much.
        algorithm: Who proposes trials.
        stopping: Which trials end early.
        confirm: What follows.
        controls: Names, and each the values of a recipe that is run beside the best trials, to show
            what would come of it.
    """

    run: RunConfig
    resume: bool = False
    recipe: str
    workers: WorkersConfig | None = None
    space: dict[str, Any]
    objectives: tuple[str, ...] = ("fid_nfe1",)
    validation: ValidationConfig
    budget: BudgetConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    stopping: StoppingConfig
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    controls: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        measured = [fid_name(steps) for steps in self.validation.nfe]
        for objective in self.objectives:
            require(
                objective in measured,
                "objectives",
                objective,
                f"no trial would report it: validation.nfe gives {', '.join(measured)}",
                "Use one of these, or add its step count to validation.nfe",
            )
        require(
            0 < len(self.objectives) <= 2 and len(set(self.objectives)) == len(self.objectives),
            "objectives",
            self.objectives,
            "not one or two different ones",
            "Use e.g. [fid_nfe1]",
        )
        first = fid_name(self.validation.nfe[0])
        require(
            self.objectives[0] == first,
            "objectives",
            self.objectives,
            f"the first one is not {first}, by which validation.nfe ranks checkpoints",
            "Write both in the same order",
        )
        two = len(self.objectives) == 2
        require(
            two or self.algorithm.kind != NSGA2,
            "algorithm.kind",
            NSGA2,
            "it is for two objectives",
            "Use tpe, or name a second one",
        )
        require(
            not two or self.stopping.kind == "none",
            "stopping.kind",
            self.stopping.kind,
            "with two objectives there is no order by which trials could be stopped",
            "Use none",
        )
        stopping, budget = self.stopping, self.budget
        population = self.algorithm.kind == PBT
        require(
            not population or stopping.kind == "none",
            "stopping.kind",
            stopping.kind,
            "pbt does not stop trials, it gives them what better ones have learned",
            "Use none",
        )
        require(
            not population or (budget.trials or 2) > 1,
            "budget.trials",
            budget.trials,
            "no population",
            "Use 2 or more",
        )
        require(
            stopping.first_images <= budget.images,
            "budget.images",
            budget.images,
            f"a trial would end before stopping.first_images = {stopping.first_images}",
            "Give it more images, or measure sooner",
        )
        require(
            budget.trials is not None or self.algorithm.kind == GRID,
            "budget.trials",
            None,
            f"{self.algorithm.kind} proposes trials without end",
            "Say how many",
        )

    @property
    def checkpoint_images(self) -> int:
        """Distance between the measurements of a trial."""
        at_end_only = self.stopping.kind == "none" and self.algorithm.kind != PBT
        return self.budget.images if at_end_only else self.stopping.first_images

    @property
    def objective(self) -> str:
        """The one that decides."""
        return self.objectives[0]

    @property
    def error(self) -> str:
        """Name of its standard error."""
        return error_name(self.validation.nfe[0])
