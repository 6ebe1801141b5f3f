"""A search from end to end: what it would run, the trials, the runs that confirm the best."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from facm_core.errors import require
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult, Refused, as_dict, as_yaml, load_config
from facm_platform.config.sections import TeacherConfig
from facm_platform.search.config import PBT, SearchConfig
from facm_platform.search.findings import Confirmed, Findings
from facm_platform.search.proposals import Listed, Proposals, Study
from facm_platform.search.published import RECORDS, records_text
from facm_platform.search.records import STOPPED, Record, Records
from facm_platform.search.report import LEADERBOARD, REPORT, gist, leaderboard, report_files
from facm_platform.search.runner import Room, room_for, run_trials
from facm_platform.search.schedulers import scheduler_of
from facm_platform.search.space import Space, Values
from facm_platform.search.trial import IMAGES, Trial
from facm_platform.tracking import (
    Run,
    connect_store,
    embedded_root,
    find_run,
    open_run,
)
from facm_platform.training import distill
from facm_platform.training.run import last_checkpoint
from facm_platform.training.validation import distances

IDENTITY, WINNER = "search.yaml", "winner.yaml"
_JOB = "search"
_REFERENCE = "reference.safetensors"


@dataclass(frozen=True)
class SearchPlan:
    """A validated search.

    Attributes:
        config: What was asked for.
        folder_uri: Of the search.
        space: What is varied.
        base: The recipe's distillation, validated; trials differ from it in their config.
        images_per_second: Of an earlier distillation of the same teacher; None for none.
    """

    config: SearchConfig
    folder_uri: str
    space: Space
    base: distill.DistillPlan
    images_per_second: float | None

    @property
    def trials(self) -> int:
        """How many are proposed."""
        return int(min(self.space.size, self.config.budget.trials or math.inf))

    @property
    def confirming_runs(self) -> int:
        """How many runs follow them."""
        recipes = 1 + len(self.config.controls) + min(self.config.confirm.top, self.trials)
        return recipes * len(self.config.confirm.seeds)

    def describe(self) -> str:
        """The space, what would run, and what it would cost."""
        config, workers = self.config, self.base.config.workers
        lines = [f"search {config.run.name}: {config.recipe} for {' and '.join(config.objectives)}"]
        lines += [f"  {key}: {words}" for key, words in self._space_in_words()]
        stopping = config.stopping
        how = f"{config.algorithm.kind}, seed {config.algorithm.seed}"
        if stopping.kind != "none":
            rungs = ", ".join(f"{images:,}" for images in self._rungs())
            how += f"; {stopping.kind}: one in {stopping.reduction_factor} goes on after {rungs}"
        lines += [how, ""]
        images = self.base.config.train.total_images
        runs = {"trials": self.trials, "confirming runs": self.confirming_runs}
        runs["together"] = sum(runs.values())
        unit = "GPU" if workers.gpu else "worker"
        lines.append(f"{'':16}{'runs':>6}{'images, at most':>17}{unit + ' hours':>14}")
        for name, count in runs.items():
            hours = self.hours(count * images)
            known = "" if hours is None else f"{hours:14.2f}"
            lines.append(f"{name:16}{count:6,}{count * images:17,}{known}")
        speed = self.images_per_second
        lines.append(
            f"at {speed:,.0f} images/s, as in the last distillation of this teacher"
            if speed
            else "hours: not known before a distillation of this teacher is in MLflow"
        )
        if config.budget.hours is not None:
            lines.append(f"trials end when {config.budget.hours:g} {unit} hours are spent")
        lines.append(
            f"each run has {workers.max} workers of {workers.cpus:g} CPUs"
            + (" and a GPU" if workers.gpu else "")
            + "; how many run at once is told when the cluster is known"
        )
        return "\n".join(lines)

    def execute(self) -> JobResult:
        """Search, confirm, report; the same command with ``--resume`` goes on where it stopped."""
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        tags = distill.lineage(self.base.manifest, self.base.teacher)
        parent = open_run(
            store, config.run.name, job=_JOB, config=config, tags=tags, resume=config.resume
        )
        kept = storage.join(self.folder_uri, IDENTITY)
        storage.write_bytes(kept, identity(config).encode())
        with parent, connected():
            room = room_for(self.base.config.workers, config.validation)
            print(room, flush=True)
            return _Execution(self, parent, room).run()

    def trial(self, number: int, params: Mapping[str, Any], values: Values) -> Trial:
        """A trial of these values, which a chooser made of `params`."""
        name = f"{self.config.run.name}-{number:04d}"
        population = self.config.algorithm.kind == PBT
        varied = [d.key for d in self.space.dimensions] if population else []
        return Trial(number, name, dict(params), values, self._plan(name, values), tuple(varied))

    def confirming(self, name: str, values: Values, number: int, seed: int) -> Trial:
        """A run of these values that is measured at its end alone, with more samples."""
        plan = self._plan(name, values)
        assert plan.validation is not None
        train = plan.config.train
        train = replace(train, seed=seed, checkpoint_images=train.images)
        validation = replace(plan.validation, samples=self.config.confirm.samples)
        config = replace(plan.config, train=train, validation=validation)
        plan = replace(plan, config=config, validation=validation)
        return Trial(number, name, {}, values, plan)

    def recipe(self, values: Values, seed: int) -> distill.DistillConfig:
        """What jobs/distill.py takes to make a confirming run again."""
        run = self.config.run
        plan = self.confirming(f"{run.name}-winner", values, 0, seed).plan
        assert plan.validation is not None
        return replace(
            plan.config,
            run=replace(run, name=f"{run.name}-winner"),
            data=replace(plan.config.data, uri=plan.data_uri),
            teacher=TeacherConfig(uri=plan.teacher.uri),
            validation=replace(plan.validation, reference_uri=None),
        )

    def _plan(self, name: str, values: Values) -> distill.DistillPlan:
        config = replace(
            varied(self.config, values),
            run=replace(self.base.config.run, name=name),
        )
        folder_uri = storage.join(self.base.config.run.storage_uri, name)
        return replace(self.base, config=config, folder_uri=folder_uri)

    def _space_in_words(self) -> Iterator[tuple[str, str]]:
        for dimension, within in self.space.all_dimensions():
            yield dimension.key, dimension.describe + (f" (where {within})" if within else "")
        for choice in self.space.alternatives:
            yield choice.name, "one of " + ", ".join(choice.spaces)

    def _rungs(self) -> Iterator[int]:
        images = self.config.stopping.first_images
        while images < self.config.budget.images:
            yield images
            images *= self.config.stopping.reduction_factor

    def hours(self, images: int) -> float | None:
        """Of workers, for training on so many images; None where the speed is not known."""
        speed = self.images_per_second
        return speed and images / speed * self.base.config.workers.max / 3600


def identity(config: SearchConfig) -> str:
    """What makes a search that search; it may go on with more trials or hours."""
    given = as_dict(replace(config, resume=False))
    for name in ("trials", "hours", "concurrent"):
        del given["budget"][name]
    return json.dumps(given, indent=2, sort_keys=True) + "\n"


def varied(config: SearchConfig, values: Values) -> distill.DistillConfig:
    """The recipe with these values, as long and as often measured as the search wants it.

    Raises:
        InvalidInputError: the recipe does not have such a key, or does not take such a value.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    overrides.append(f"train.images={config.budget.images}")
    given = load_config(distill.DistillConfig, config.recipe, overrides)
    images = config.budget.images
    train = replace(
        given.train,
        checkpoint_images=config.checkpoint_images,
        # From which averages of other widths are made.
        keep_averages=True,
        # From any of them another trial may go on.
        keep_checkpoints=images if config.algorithm.kind == PBT else 1,
    )
    reference = storage.join(storage.absolute(config.run.storage_uri), config.run.name, _REFERENCE)
    validation = replace(config.validation, reference_uri=reference)
    workers = config.workers or given.workers
    return replace(given, train=train, workers=workers, validation=validation)


class _Execution:
    """A search that is under way."""

    def __init__(self, plan: SearchPlan, parent: Run, room: Room) -> None:
        self._plan, self._parent = plan, parent
        self._at_once = min(room.trials, plan.config.budget.concurrent or room.trials)
        self._trials = Records(storage.join(plan.folder_uri, "trials"))
        self._confirming = Records(storage.join(plan.folder_uri, "confirming"))

    def run(self) -> JobResult:
        """All of it."""
        plan, config = self._plan, self._plan.config
        study = Study(
            plan.space,
            config.algorithm,
            config.objectives,
            config.budget.trials,
            list(self._trials),
            plan.trial,
        )
        self._check_population()
        self._run(study, self._trials, scheduler_of(config, plan.space), self._seconds_left())
        finished = [record for record in self._trials if record.finished]
        if not finished:
            reasons = "; ".join(f"{r.name} {r.state} {r.reason}" for r in self._trials)
            remedy = "Mend what failed, or --resume with more trials or budget.hours"
            raise Refused(f"no trial has finished: {reasons}. {remedy}")
        finished.sort(key=lambda record: record.last[config.objective])
        candidates = self._candidates(finished[: config.confirm.top])
        self._confirm(candidates)
        findings = Findings(config, list(self._trials), study.study, candidates)
        winner = plan.recipe(findings.winner.values, config.confirm.seeds[0])
        files = report_files(findings, plan.describe()) | {WINNER: as_yaml(winner).encode()}
        with tempfile.TemporaryDirectory(prefix="facm-search-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
                storage.write_bytes(storage.join(plan.folder_uri, name), content)
            self._parent.log_artifact(Path(folder))
        metrics = findings.metrics()
        self._parent.log_metrics(metrics, images_seen=plan.base.config.train.total_images)
        print(f"\n{files[REPORT].decode()}", flush=True)
        return JobResult(
            run_id=self._parent.run_id,
            run_name=config.run.name,
            artifact_uri=plan.folder_uri,
            metrics=metrics,
        )

    def _check_population(self) -> None:
        trials = self._plan.trials
        require(
            self._plan.config.algorithm.kind != PBT or trials <= self._at_once,
            "budget.trials",
            trials,
            f"a population is trained side by side, and {self._at_once} trials fit at once",
            "Use fewer, or a larger cluster",
        )

    def _run(
        self,
        proposals: Proposals,
        records: Records,
        scheduler: TrialScheduler,
        seconds: float | None = None,
    ) -> None:
        run_trials(
            proposals,
            records,
            scheduler,
            at_once=self._at_once,
            seconds=seconds,
            tags={MLFLOW_PARENT_RUN_ID: self._parent.run_id},
            changed=self._changed,
        )

    def _seconds_left(self) -> float | None:
        """Of `budget.hours`, when so many trials run at once."""
        hours = self._plan.config.budget.hours
        if hours is None:
            return None
        workers = self._plan.base.config.workers.max
        used = sum(record.seconds for record in self._trials)
        # Tune takes 0 for no limit.
        return max(1.0, (3600 * hours / workers - used) / self._at_once)

    def _changed(self, record: Record) -> None:
        """Tell of it, and show it on the leaderboard."""
        config, last = self._plan.config, record.last
        images = f"{last[IMAGES]:11,.0f} images" if last else ""
        distance = f"{last[config.objective]:8.2f} ± {last[config.error]:.2f}" if last else ""
        print(
            f"{record.name} {record.state:8} {images} {distance} {gist(record.reason)}", flush=True
        )
        text = leaderboard(config, list(self._trials))
        storage.write_bytes(storage.join(self._plan.folder_uri, LEADERBOARD), text.encode())
        self._parent.log_text(text, LEADERBOARD)
        self._parent.log_text(records_text(self._trials, self._confirming), RECORDS)
        # Those that were left for another one, or stopped, still stand as running.
        for name in record.runs if record.state == STOPPED else record.runs[:-1]:
            run = find_run(self._parent.store, name, distill.JOB)
            if run is not None:
                run.finish("KILLED")

    def _candidates(self, best: list[Record]) -> list[Confirmed]:
        """The recipe, the controls and the best trials."""
        config = self._plan.config
        tracked = self._plan.base.config.train.ema_sigma_rels
        candidates = [Confirmed("recipe", {})]
        candidates += [Confirmed(name, dict(values)) for name, values in config.controls.items()]
        for record in best:
            values, widths = dict(record.values), self._widths(record)
            if widths:
                width = min(widths, key=lambda width: widths[width])
                values["train.ema_sigma_rels"] = sorted({*tracked, width})
                values["train.export_sigma_rel"] = width
            candidates.append(Confirmed(f"{record.number:04d}", values, widths))
        return candidates

    def _widths(self, record: Record) -> dict[float, float]:
        """Distance of the trial's last checkpoint, by the width of its average."""
        config = self._plan.config
        if not config.confirm.sigma_rels:
            return {}
        kept = storage.join(self._plan.folder_uri, "widths", f"{record.name}.json")
        if storage.exists(kept):
            return {float(w): d for w, d in json.loads(storage.read_text(kept)).items()}
        plan = self._plan.trial(record.number, record.params, record.values).plan
        folder_uri = storage.join(plan.config.run.storage_uri, record.runs[-1])
        checkpoint, needs = last_checkpoint(folder_uri), config.validation
        assert checkpoint is not None
        remote: Any = ray.remote(num_cpus=needs.cpus, num_gpus=int(needs.gpu))(distances)
        task, widths = plan.task("", ""), config.confirm.sigma_rels
        pending = [remote.remote(task, checkpoint, width) for width in widths]
        found = {
            width: metrics[config.objective]
            for width, (_, metrics) in zip(widths, ray.get(pending), strict=True)
        }
        storage.write_bytes(kept, json.dumps(found, indent=2).encode())
        return found

    def _confirm(self, candidates: list[Confirmed]) -> None:
        """Train and measure each of them on every seed."""
        plan, config = self._plan, self._plan.config
        trials: list[Trial] = []
        of: dict[str, Confirmed] = {}
        # Seed by seed, so that an interrupted search has something to show.
        for seed in config.confirm.seeds:
            for candidate in candidates:
                name = f"{config.run.name}-{candidate.name}-seed{seed}"
                trials.append(plan.confirming(name, candidate.values, len(trials), seed))
                of[name] = candidate
        fifo = FIFOScheduler()  # type: ignore[no-untyped-call]
        self._run(Listed(trials), self._confirming, fifo)
        for record in self._confirming:
            of[record.name].runs.append(record)
