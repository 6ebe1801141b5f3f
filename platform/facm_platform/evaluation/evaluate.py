"""Evaluation of a student and its teacher: numbers, pictures, and a registered version."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from facm_core.metrics import self_test
from facm_platform.cluster import connected, require_cpus
from facm_platform.config import JobResult
from facm_platform.evaluation.config import EvaluateConfig, check_together
from facm_platform.evaluation.engine import Engine, View, Workload, peak_memory_mib
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.evaluation.measured import Reference, Score, Shown, score
from facm_platform.evaluation.protocol import Protocol, check_published, label_policy
from facm_platform.evaluation.reference import ReferenceFile, find_reference, reference_name
from facm_platform.evaluation.report import (
    SHEET,
    EvaluationResult,
    as_card,
    as_json,
    as_metrics,
    as_table,
)
from facm_platform.evaluation.sheet import Group, draw_sheet
from facm_platform.latents import LatentManifest
from facm_platform.registry import ArtifactInfo, load_artifact, read_artifact
from facm_platform.registry.artifact import CARD, CONFIG, OBJECTIVES, WEIGHTS
from facm_platform.registry.pyfunc import pyfunc_files
from facm_platform.registry.reproduction import write_samples
from facm_platform.registry.versions import Version, register_version
from facm_platform.storage import absolute, check_reachable, join, local_copy, write_bytes
from facm_platform.tracking import (
    Run,
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

__all__ = ["EvaluateConfig", "EvaluatePlan", "prepare"]

# The sheet is for the eye: of a thousand classes, or rows with texts, it shows the first.
_SHEET_CLASSES, _SHEET_SAMPLES = 20, 3
_MODEL_FOLDER = "model"
# Of the run's folder: finished parts of an evaluation under way.
_KEPT = "parts"

_Scores = dict[str, dict[int, Score]]
_Shown = dict[str, dict[int, Shown]]


@dataclass(frozen=True)
class EvaluatePlan:
    """A validated `EvaluateConfig` with what it names."""

    config: EvaluateConfig
    folder_uri: str
    manifest: LatentManifest
    features: Extractor
    reference: ReferenceFile
    student: ArtifactInfo
    teacher: ArtifactInfo | None

    @property
    def protocol(self) -> Protocol:
        """Meaning of the numbers."""
        return Protocol(
            name=self.config.protocol,
            extractor=self.features.name,
            extractor_sha256=self.features.sha256,
            reference_sha256=self.reference.sha256,
            samples=self.config.samples,
            seed=self.config.seed,
            label_policy=label_policy(self.manifest, self.config.label_policy),
            resize=self.features.resize,
            precision=self.features.precision,
        )

    def describe(self) -> str:
        """What would be measured."""
        steps = f"student in {list(self.config.nfe)} steps"
        if self.teacher is not None:
            steps += f", teacher in {list(self.config.teacher_nfe)}"
        register = self.config.register_as
        return (
            f"evaluate {self.config.run.name}: {steps}, {self.config.samples:,} samples each, on "
            f"{self.config.actors} actors, to {self.folder_uri}\n"
            f"protocol: {self.protocol.id} (features {self.features.describe}; reference "
            f"{self.reference.uri}{self._to_make})\n"
            f"student: {self.student.uri} (sha256 {self.student.sha256})"
            + (f"\nregister as {register}, challenger" if register else "")
        )

    @property
    def _sheet(self) -> tuple[int, int]:
        """Rows of the sheet, and columns of a group."""
        classes = self.manifest.num_classes
        if classes:
            return min(classes, _SHEET_CLASSES), _SHEET_SAMPLES
        return min(self.manifest.rows, self.config.samples, _SHEET_CLASSES), 1

    @property
    def _to_make(self) -> str:
        rows = f"{self.manifest.rows:,}"
        return "" if self.reference.exists else f", to be made of {rows} rows"

    def execute(self) -> JobResult:
        """Evaluate and say where everything is."""
        result = self.evaluate()
        return JobResult(
            run_id=result.run_id,
            run_name=self.config.run.name,
            artifact_uri=self.folder_uri,
            metrics=result.metrics(),
        )

    def evaluate(self) -> EvaluationResult:
        """Measure on the cluster, under one MLflow run; write sheet, table, card; register."""
        self_test()
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        tags = self._lineage()
        run = open_run(store, config.run.name, job="evaluate", config=config, tags=tags)
        with run, connected():
            require_cpus("actors", config.actors, spare=0)
            reference, shown, scores, memory = self._measure()
            self._write_report(run, reference, shown, scores)
            version = self._register(run, scores)
            result = EvaluationResult(
                run_id=run.run_id,
                protocol=self.protocol,
                scores=scores,
                reference_agreement=reference.agreement,
                sample_sheet=join(self.folder_uri, SHEET),
                model_name=version.model if version else None,
                model_version=version.number if version else None,
            )
            run.log_metrics(result.metrics() | memory, images_seen=self.student.config.images_seen)
        return result

    def _measure(self) -> tuple[Reference, _Shown, _Scores, dict[str, float]]:
        """The reference, every model at each of its step counts, the memory it took."""
        rows, columns = self._sheet
        workload = Workload(
            protocol=self.protocol,
            data_uri=absolute(self.config.data.uri, "data.uri"),
            manifest=self.manifest,
            view=View(
                kind=self.config.extractor,
                features_uri=self.features.uri,
                shown_classes=rows,
                shown_samples=columns,
                keep=self.protocol.kept_features,
                batch_size=self.config.batch_size,
                gpu=self.config.gpu,
            ),
        )
        todo = [("student", self.student, steps) for steps in self.config.nfe]
        if self.teacher is not None:
            todo[:0] = [("teacher", self.teacher, steps) for steps in self.config.teacher_nfe]
        shown: _Shown = {}
        scores: _Scores = {}
        kept_uri = join(self.folder_uri, _KEPT)
        with Engine(workload, self.features, self.config.actors, kept_uri) as engine:
            reference = engine.reference(self.reference)
            for model, artifact, steps in todo:
                parts = engine.samples(artifact, steps)
                found = score(parts, reference)
                scores.setdefault(model, {})[steps] = found
                images = {key: image for part in parts for key, image in part.shown.items()}
                shown.setdefault(model, {})[steps] = images
                told = ", ".join(f"{k} {v:.4g}" for k, v in as_metrics(found, steps).items())
                print(f"{model} at {steps} step(s): {told}", flush=True)
            actor, driver = engine.peak_memory_mib(), peak_memory_mib()
            print(f"most memory: {actor:,.0f} MiB an actor, {driver:,.0f} MiB here", flush=True)
            memory = {"actor_memory_mib": actor, "driver_memory_mib": driver}
            engine.forget()
        return reference, shown, scores, memory

    def _write_report(
        self,
        run: Run,
        reference: Reference,
        shown: _Shown,
        scores: _Scores,
    ) -> None:
        """Sheet, table and JSON into the run's folder and MLflow; the card beside the student."""
        card = as_card(self.student.config, self.student.sha256, self.protocol, scores).encode()
        texts = {
            "evaluation.json": as_json(self.protocol, scores, reference.agreement),
            "evaluation.md": as_table(self.protocol, scores),
        }
        for name, text in texts.items():
            write_bytes(join(self.folder_uri, name), text.encode())
            run.log_text(text, name)
        with tempfile.TemporaryDirectory(prefix="facm-") as folder:
            sheet = Path(folder) / SHEET
            draw_sheet(sheet, _groups(reference.shown, shown, scores), *self._sheet)
            run.log_artifact(sheet)
            for uri in (self.folder_uri, self.student.uri):
                write_bytes(join(uri, SHEET), sheet.read_bytes())
        write_bytes(join(self.student.uri, CARD), card)

    def _register(self, run: Run, scores: _Scores) -> Version | None:
        """Copy the student's artefact to the run, for MLflow to run too: the challenger."""
        if self.config.register_as is None:
            return None
        with local_copy(self.student.uri) as folder:
            for name in (WEIGHTS, CONFIG, CARD, SHEET):
                run.log_artifact(folder / name, _MODEL_FOLDER)
        with pyfunc_files(self.student.config) as folder:
            write_samples(folder, load_artifact(self.student.uri, "student_uri"))
            run.log_artifact(folder, _MODEL_FOLDER)
        tags = self._lineage() | {
            name: repr(value)
            for steps, found in scores["student"].items()
            for name, value in as_metrics(found, steps).items()
        }
        method = OBJECTIVES[self.student.config.objective]
        description = f"{method} student, {as_table(self.protocol, scores)}"
        return register_version(run, self.config.register_as, _MODEL_FOLDER, tags, description)

    def _lineage(self) -> dict[str, str]:
        student = self.student.config
        lineage = {
            "model_sha256": self.student.sha256,
            "manifest_sha256": self.manifest.sha256,
            "extractor_sha256": self.features.sha256,
            "protocol_id": self.protocol.id,
            "training_config_hash": student.config_hash,
        }
        if student.teacher_sha256 is not None:
            lineage["teacher_sha256"] = student.teacher_sha256
        return lineage


def prepare(config: EvaluateConfig) -> EvaluatePlan:
    """Check everything an evaluation needs, without touching a cluster.

    Raises:
        InvalidInputError: something missing or damaged, inputs that do not belong together,
            storage or MLflow out of reach.
    """
    check_run_name("run.name", config.run.name)
    storage_uri = absolute(config.run.storage_uri, "run.storage_uri")
    check_reachable(storage_uri, "run.storage_uri")
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    manifest = LatentManifest.load(config.data.uri)
    features = load_extractor(config.extractor, config.features_uri)
    student = read_artifact(config.student_uri, "student_uri")
    teacher = None
    if config.teacher_uri is not None:
        teacher = read_artifact(config.teacher_uri, "teacher_uri")
    check_together(config, manifest, features, student, teacher)
    folder_uri = join(storage_uri, config.run.name)
    kept_uri = join(folder_uri, reference_name(features, manifest))
    reference = find_reference(config.reference_uri or kept_uri, features, manifest)
    plan = EvaluatePlan(config, folder_uri, manifest, features, reference, student, teacher)
    check_published("protocol", plan.protocol)
    return plan


def _groups(real: Shown, shown: _Shown, scores: _Scores) -> list[Group]:
    """Real images; the teacher at its most and its fewest steps; the student at each."""
    groups = [Group("real", "the reference", real)] if real else []
    teacher = shown.get("teacher", {})
    # The dictionary drops the second of two equal counts.
    ends = dict.fromkeys((max(teacher), min(teacher))) if teacher else {}
    columns = [("teacher", steps) for steps in ends]
    columns += [("student", steps) for steps in sorted(shown["student"])]
    for model, steps in columns:
        noun = "step" if steps == 1 else "steps"
        subheading = f"{steps} {noun} · FID {scores[model][steps].fid:.3g}"
        groups.append(Group(model, subheading, shown[model][steps]))
    return groups
