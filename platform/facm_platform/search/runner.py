"""Trials on Ray Tune: as many at once as the cluster has room for, each recorded as it goes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from facm_core.errors import InvalidInputError
from facm_platform.latents.source import READ_TASK_CPUS
from facm_platform.search.proposals import Proposals
from facm_platform.search.records import FAILED, FINISHED, RUNNING, STOPPED, Record, Records
from facm_platform.search.schedulers import Halving
from facm_platform.search.trial import FAILED as TOLD_FAILED
from facm_platform.search.trial import FINISHED as TOLD_FINISHED
from facm_platform.search.trial import IMAGES, PLACE, SPEED, VALUES, Place, Trial, run_trial
from facm_platform.training.config import ValidationConfig, WorkersConfig

# A trial's driver waits. It needs to be something, though: Tune does not schedule what is free.
_DRIVER_CPUS = 0.01

# The proposals end of themselves.
_WITHOUT_END = 10**9


@dataclass(frozen=True)
class Room:
    """What a trial takes of the cluster, and how often that is there.

    Attributes:
        cpus: Of a trial: its workers, the reading of their data, measuring, and its driver.
        gpus: The same.
        cluster_cpus: Of the cluster.
        cluster_gpus: The same.
    """

    cpus: float
    gpus: int
    cluster_cpus: float
    cluster_gpus: float

    @property
    def trials(self) -> int:
        """That fit at once, whatever each of them waits for."""
        by_cpus = int(self.cluster_cpus / self.cpus)
        return min(by_cpus, int(self.cluster_gpus / self.gpus)) if self.gpus else by_cpus

    def __str__(self) -> str:
        has, takes = f"{self.cluster_cpus:g} CPUs", f"{self.cpus:g}"
        if self.gpus:
            has, takes = f"{has} and {self.cluster_gpus:g} GPUs", f"{takes} and {self.gpus}"
        return (
            f"room for {self.trials} trials at once: the cluster has {has}, a trial takes {takes}"
        )


def room_for(workers: WorkersConfig, validation: ValidationConfig) -> Room:
    """On the connected cluster.

    Raises:
        InvalidInputError: not even for one trial; with the numbers.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    room = Room(
        cpus=workers.max * workers.cpus + READ_TASK_CPUS + validation.cpus + _DRIVER_CPUS,
        gpus=workers.max * workers.gpu + validation.gpu,
        cluster_cpus=float(resources.get("CPU", 0)),
        cluster_gpus=float(resources.get("GPU", 0)),
    )
    if not room.trials:
        remedy = "Use fewer workers, or less workers.cpus or validation.cpus, or a larger cluster"
        raise InvalidInputError("workers", workers.max, str(room), remedy)
    return room


def run_trials(
    proposals: Proposals,
    records: Records,
    scheduler: TrialScheduler,
    *,
    at_once: int,
    seconds: float | None,
    tags: dict[str, str],
    changed: Callable[[Record], None],
) -> None:
    """Run what is proposed, until there is no more; a trial that fails does not stop the others.

    Trials of which there is a record that they have ended are not run again: they are told to
    `proposals` and to `scheduler` as if they had been.

    Args:
        proposals: The trials.
        records: Of those that were begun before, and of these.
        scheduler: Which trials end early.
        at_once: So many run side by side.
        seconds: After so many, trials that still run are stopped; None for never.
        tags: Of the trials' MLflow runs.
        changed: Called with each record that has changed.
    """
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # files that nobody reads
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails reports no metric
        "RAY_AIR_NEW_OUTPUT": "0",  # tables: what there is to say, `changed` says
    }
    # It misses those files.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    feed = _Feed(proposals, records, scheduler, tags)
    ledger = _Ledger(feed, proposals, records, changed)
    with tempfile.TemporaryDirectory(prefix="facm-search-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(run_trial, {"CPU": _DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=feed,
                scheduler=scheduler,
                num_samples=_WITHOUT_END,
                max_concurrent_trials=at_once,
                time_budget_s=seconds,
                trial_name_creator=lambda trial: feed.trials[trial.trial_id].name,
                trial_dirname_creator=lambda trial: feed.trials[trial.trial_id].name,
            ),
            run_config=tune.RunConfig(
                name="trials", storage_path=folder, callbacks=[ledger], verbose=0
            ),
        )
        tuner.fit()
    ledger.close()


class _Feed(Searcher):
    """Gives Tune the proposals of which no record says that they have ended.

    Attributes:
        trials: What it gave, by Tune's names.
    """

    def __init__(
        self,
        proposals: Proposals,
        records: Records,
        scheduler: TrialScheduler,
        tags: dict[str, str],
    ) -> None:
        super().__init__()
        self._proposals, self._records, self._scheduler = proposals, records, scheduler
        self._tags = tags
        self.trials: dict[str, Trial] = {}

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """They are those of the search."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial."""
        while (trial := self._proposals.next()) is not None:
            record = self._records.get(trial.name)
            if record is None or not record.ended:
                self.trials[trial_id] = trial
                place = record and record.place
                now = place["values"] if place else trial.values
                values = {key: now[key] for key in trial.varied}
                return {"trial": trial, "tags": self._tags, VALUES: values, "place": place}
            if isinstance(self._scheduler, Halving):
                self._scheduler.replay(record)
            self._proposals.ended(record)
        return Searcher.FINISHED

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """The ledger tells the proposals."""

    def save(self, checkpoint_path: str) -> None:
        """The records are what is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """From them."""


class _Ledger(tune.Callback):
    """Records what becomes of each trial."""

    def __init__(
        self,
        feed: _Feed,
        proposals: Proposals,
        records: Records,
        changed: Callable[[Record], None],
    ) -> None:
        self._feed, self._proposals = feed, proposals
        self._records, self._changed = records, changed
        self._started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """A trial begins, or goes on."""
        self._keep(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: Any, trial: TuneTrial, result: dict[str, Any], **_: Any
    ) -> None:
        """It has measured, or failed."""
        record = self._record(trial)
        if TOLD_FAILED in result:
            record.state, record.reason = FAILED, str(result[TOLD_FAILED])
            return
        known = [IMAGES, *(name for name in result if name.startswith("fid_"))]
        # One that goes on tells again what was measured since.
        before = [one for one in record.measured if one[IMAGES] < result[IMAGES]]
        record.measured = [*before, {name: float(result[name]) for name in known}]
        record.place = json.loads(result[PLACE])
        place = Place(**record.place)
        record.values = place.recipe
        record.runs = list(dict.fromkeys([*record.runs, place.run]))
        if TOLD_FINISHED in result:
            record.state, record.images_per_second = FINISHED, float(result[SPEED])
        else:
            self._keep(record)

    def on_trial_complete(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """It has ended, or was stopped."""
        record = self._record(trial)
        if record.state == RUNNING:
            record.state = STOPPED
        self._ended(record)

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """Its driver was lost, or never began."""
        record, error = self._record(trial), trial.get_error()
        record.state, record.reason = FAILED, str(error or "its driver could not be started")
        self._ended(record)

    def close(self) -> None:
        """Those that still run were stopped, since time is up."""
        for name in list(self._started):
            record = self._records.get(name)
            assert record is not None
            record.state, record.reason = STOPPED, "budget.hours are spent"
            self._ended(record)

    def _record(self, trial: TuneTrial) -> Record:
        """That of a trial, whose driver may have been lost before it began."""
        begun = self._feed.trials[trial.trial_id]
        record = self._records.get(begun.name) or Record(
            number=begun.number,
            name=begun.name,
            params=begun.params,
            values=begun.values,
            runs=[begun.name],
        )
        self._started.setdefault(record.name, time.monotonic() - record.seconds)
        return record

    def _ended(self, record: Record) -> None:
        self._keep(record)
        del self._started[record.name]
        self._proposals.ended(record)

    def _keep(self, record: Record) -> None:
        record.seconds = time.monotonic() - self._started[record.name]
        self._records.keep(record)
        self._changed(record)
