"""FACM, MeanFlow and sCM under one teacher, one average and one protocol, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from facm_core.objectives import FACMConfig, MeanFlowConfig, SCMConfig
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.config.sections import DataConfig, RunConfig, TeacherConfig
from facm_platform.evaluation import evaluate
from facm_platform.evaluation.config import check_measure
from facm_platform.evaluation.extractors import FITTED, load_extractor
from facm_platform.evaluation.report import EvaluationResult
from facm_platform.registry.artifact import OBJECTIVES
from facm_platform.training import distill
from facm_platform.training.config import TrainConfig, WorkersConfig

METHODS = ("facm", "mean_flow", "scm")

# Metrics of a distillation.
_COST = ("images_per_second", "memory_mib")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Recipe of jobs/compare.py.

    Attributes:
        run: Name and place of the table; each method's runs have its name behind this one.
        data: Latent set, and reference of the FID.
        teacher: Of all methods; every student starts from its weights.
        objective: FACM.
        mean_flow: MeanFlow.
        scm: sCM.
        train: Optimisation, the same for all.
        workers: Ray Train workers.
        extractor: Kind of the feature extractor, as jobs/evaluate.py takes it.
        features_uri: Its address.
        samples: Number of samples for a FID; a multiple of the number of classes.
        nfe: Step counts.
        batch_size: Samples an actor computes at once.
        actors: Ray actors that sample, one CPU each.
    """

    run: RunConfig
    data: DataConfig
    teacher: TeacherConfig
    objective: FACMConfig = field(default_factory=FACMConfig)
    mean_flow: MeanFlowConfig = field(default_factory=MeanFlowConfig)
    scm: SCMConfig = field(default_factory=SCMConfig)
    train: TrainConfig
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    extractor: str = FITTED
    features_uri: str
    samples: int = 5000
    nfe: tuple[int, ...] = (1, 2, 4)
    batch_size: int = 64
    actors: int = 2

    def distillation(self, method: str) -> distill.DistillConfig:
        """Of one of `METHODS`."""
        section = "objective" if method == "facm" else method
        return distill.DistillConfig(
            run=self._run(method),
            data=self.data,
            teacher=self.teacher,
            train=self.train,
            workers=self.workers,
            **{section: getattr(self, section)},
        )

    def evaluation(self, method: str, student_uri: str) -> evaluate.EvaluateConfig:
        """Of the student that it gave; the teacher is measured beside the first."""
        return evaluate.EvaluateConfig(
            run=self._run(f"{method}-evaluation"),
            data=self.data,
            student_uri=student_uri,
            teacher_uri=self.teacher.uri if method == METHODS[0] else None,
            extractor=self.extractor,
            features_uri=self.features_uri,
            samples=self.samples,
            nfe=self.nfe,
            teacher_nfe=self.nfe,
            batch_size=self.batch_size,
            actors=self.actors,
            gpu=self.workers.gpu,
        )

    def _run(self, suffix: str) -> RunConfig:
        return replace(self.run, name=f"{self.run.name}-{suffix}")


@dataclass(frozen=True)
class ComparePlan:
    """A validated comparison."""

    config: CompareConfig
    distillations: Mapping[str, distill.DistillPlan]

    def describe(self) -> str:
        """What would be distilled."""
        return "\n".join(plan.describe() for plan in self.distillations.values())

    def execute(self) -> JobResult:
        """Distill and measure one after the other; the same command goes on where it stopped."""
        rows: dict[str, dict[str, float]] = {}
        with connected():
            for method, plan in self.distillations.items():
                print(f"\n{plan.describe()}", flush=True)
                trained = plan.execute()
                evaluation = self.config.evaluation(method, trained.artifact_uri)
                result = evaluate.prepare(evaluation).evaluate()
                if "teacher" in result.scores:
                    rows["teacher"] = _fids(result, "teacher")
                rows[method] = _fids(result, "student") | {
                    name: trained.metrics[name] for name in _COST
                }
        folder = storage.join(storage.absolute(self.config.run.storage_uri), self.config.run.name)
        table = as_table(rows, self.config.nfe, result.protocol.id)
        protocol = {"id": result.protocol.id, **asdict(result.protocol)}
        values = {"protocol": protocol, "methods": rows}
        for name, text in (
            ("comparison.md", table),
            ("comparison.json", json.dumps(values, indent=2) + "\n"),
        ):
            storage.write_bytes(storage.join(folder, name), text.encode())
        print(f"\n{table}", flush=True)
        return JobResult(
            run_id=None,
            run_name=self.config.run.name,
            artifact_uri=folder,
            metrics={f"{method}.{name}": row[name] for method, row in rows.items() for name in row},
        )


def prepare(config: CompareConfig) -> ComparePlan:
    """Validate all distillations, and what their evaluations read.

    Raises:
        InvalidInputError: see `facm_platform.training.distill.prepare`; a method that the teacher
            cannot serve, or an evaluation that does not fit the latent set.
    """
    plans = {method: distill.prepare(config.distillation(method)) for method in METHODS}
    first = plans[METHODS[0]]
    features = load_extractor(config.extractor, config.features_uri)
    check_measure(config.samples, features, first.manifest)
    return ComparePlan(config, plans)


def as_table(rows: Mapping[str, Mapping[str, float]], nfe: tuple[int, ...], protocol: str) -> str:
    """Markdown: a row for each method."""
    head = ["method", *(f"FID at {steps}" for steps in nfe), "images/s", "peak MiB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for method, row in rows.items():
        fids = [f"{row[f'fid_nfe{steps}']:.2f}" for steps in nfe]
        cost = [f"{row[name]:,.0f}" if name in row else "" for name in _COST]
        lines.append([OBJECTIVES.get(method, method), *fids, *cost])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\nProtocol `{protocol}`; images/s and memory of a worker, in training.\n"


def _fids(result: EvaluationResult, model: str) -> dict[str, float]:
    return {f"fid_nfe{steps}": score.fid for steps, score in result.scores[model].items()}
