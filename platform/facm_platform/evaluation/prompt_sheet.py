"""A sheet of fixed prompts: a student in a few steps beside its teacher in many."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from facm_core.errors import InvalidInputError, require
from facm_core.samplers import time_grid
from facm_platform import storage
from facm_platform.cluster import connected, require_cpus
from facm_platform.config import JobResult
from facm_platform.config.sections import RunConfig, require_step_counts
from facm_platform.evaluation.protocol import SEED_STRIDE
from facm_platform.evaluation.scores import NAMES, ScoreConfig, load_scorer
from facm_platform.evaluation.sheet import Column, draw_prompt_sheet
from facm_platform.prompts import read_prompts
from facm_platform.registry import ArtifactConfig, ArtifactInfo, read_artifact
from facm_platform.registry.generator import Generator, check_text_encoder
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

SHEET, NUMBERS = "sheet.png", "sheet.json"


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """Recipe of jobs/sheet.py.

    Attributes:
        run: Name and place of the results.
        student_uri: Model artefact.
        teacher_uri: Its teacher, to compare with; None for the student alone.
        prompts_uri: UTF-8 file of prompts, one a line; a row of the sheet each.
        nfe: Step counts of the student, a column each.
        teacher_steps: Of the teacher (Euler; guided steps call the network twice).
        scores: Of each picture and its prompt: mappings of ``kind`` and ``weights_uri``, see
            `ScoreConfig`.
        batch_size: Pictures at once: memory and speed only.
        gpu: Whether the task that draws has one.
        seed: Of all noise; row k has the same in every column.
    """

    run: RunConfig
    student_uri: str
    teacher_uri: str | None = None
    prompts_uri: str
    nfe: tuple[int, ...] = (2, 4, 8)
    teacher_steps: int = 40
    scores: tuple[Any, ...] = ()
    batch_size: int = 4
    gpu: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_step_counts("nfe", self.nfe)
        for name in ("teacher_steps", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")
        kinds = [score.kind for score in self.built_scores()]
        once = len(set(kinds)) == len(kinds)
        require(once, "scores", kinds, "one of them comes twice", "Give each kind once")

    def built_scores(self) -> tuple[ScoreConfig, ...]:
        """The scores.

        Raises:
            InvalidInputError: another mapping than of their fields.
        """
        names = {field.name for field in dataclasses.fields(ScoreConfig)}
        built = []
        for number, given in enumerate(self.scores):
            field = f"scores.{number}"
            fits = isinstance(given, Mapping) and set(given) == names
            problem = f"no mapping of {' and '.join(sorted(names))}"
            require(fits, field, given, problem, "Use {kind: clip, weights_uri: FOLDER}")
            try:
                built.append(ScoreConfig(**given))
            except InvalidInputError as error:
                raise error.inside(field) from None
        return tuple(built)


@dataclass(frozen=True, kw_only=True)
class ScoreProtocol:
    """What two scores must share to be comparable.

    Attributes:
        kind: See `ScoreConfig`.
        weights_sha256: Of the CLIP.
        prompts_sha256: Of the prompts.
        prompts: How many they are.
        seed: Of the noise.
        nfe: Step counts of the student.
        teacher_steps: Of the teacher; None where there is none.
    """

    kind: str
    weights_sha256: str
    prompts_sha256: str
    prompts: int
    seed: int
    nfe: tuple[int, ...]
    teacher_steps: int | None

    @property
    def id(self) -> str:
        """Readable name and a hash of every field."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        return f"{self.kind}-{self.prompts}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A column.

    Attributes:
        role: ``teacher`` or ``student``.
        steps: Of each picture.
        images: uint8 (C, H, W), one a prompt.
        scores: By kind, one a prompt.
    """

    role: str
    steps: int
    images: list[Tensor]
    scores: dict[str, list[float]]

    def mean(self, kind: str) -> float:
        """Of a score, over the prompts."""
        return sum(self.scores[kind]) / len(self.scores[kind])

    def metrics(self) -> dict[str, float]:
        """``clip_nfe2``, ``teacher_clip_nfe40``."""
        prefix = "" if self.role == "student" else f"{self.role}_"
        return {f"{prefix}{kind}_nfe{self.steps}": self.mean(kind) for kind in self.scores}


@dataclass(frozen=True)
class SheetPlan:
    """A validated `SheetConfig`.

    Attributes:
        config: What was asked for.
        folder_uri: Where the sheet will be.
        prompts: Its rows.
        models: The teacher, if there is one, and the student.
        protocols: Of each score.
    """

    config: SheetConfig
    folder_uri: str
    prompts: tuple[str, ...]
    models: tuple[ArtifactInfo, ...]
    protocols: tuple[ScoreProtocol, ...]

    def describe(self) -> str:
        """What would be drawn."""
        config = self.config
        columns = f"student in {list(config.nfe)} steps"
        if config.teacher_uri is not None:
            columns = f"teacher in {config.teacher_steps} steps, {columns}"
        scores = "".join(f"\nscores {NAMES[one.kind]}: {one.id}" for one in self.protocols)
        return (
            f"sheet {config.run.name}: {len(self.prompts)} prompts, {columns}, to "
            f"{self.folder_uri}{scores}"
        )

    def execute(self) -> JobResult:
        """Draw in one Ray task; write the sheet and the numbers, also into MLflow."""
        print(self.describe(), flush=True)
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        run = open_run(store, config.run.name, job="sheet", config=config, tags=self._lineage)
        with run, connected(), tempfile.TemporaryDirectory(prefix="facm-") as folder:
            require_cpus("cpus", 1, spare=0)
            task = ray.remote(draw).options(num_cpus=1, num_gpus=int(config.gpu))
            columns: list[Drawn] = ray.get(task.remote(self))
            sheet, numbers = Path(folder, SHEET), Path(folder, NUMBERS)
            draw_prompt_sheet(sheet, self.prompts, [self._column(one) for one in columns])
            numbers.write_text(self._as_json(columns))
            for file in (sheet, numbers):
                run.log_artifact(file)
                storage.write_bytes(storage.join(self.folder_uri, file.name), file.read_bytes())
            metrics = {name: value for one in columns for name, value in one.metrics().items()}
            run.log_metrics(metrics, images_seen=self.models[-1].config.images_seen)
        return JobResult(
            run_id=run.run_id,
            run_name=config.run.name,
            artifact_uri=self.folder_uri,
            metrics=metrics,
        )

    @cached_property
    def _lineage(self) -> dict[str, str]:
        hashes = {"teacher": "teacher_sha256", "student": "model_sha256"}
        return {
            "prompts_sha256": prompts_sha256(self.prompts),
            **{hashes[one.config.role]: one.sha256 for one in self.models},
            **{f"{one.kind}_protocol_id": one.id for one in self.protocols},
        }

    def _column(self, drawn: Drawn) -> Column:
        steps = "step" if drawn.steps == 1 else "steps"
        told = f"{drawn.steps} {steps}"
        if drawn.role == "teacher":
            told = evaluations(self.models[0].config, drawn.steps)
        means = (f"{NAMES[kind]} {drawn.mean(kind):.2f}" for kind in drawn.scores)
        captions = [
            " · ".join(f"{one[row]:.2f}" for one in drawn.scores.values())
            for row in range(len(self.prompts))
        ]
        return Column(drawn.role, told, " · ".join(means), drawn.images, captions)

    def _as_json(self, columns: Sequence[Drawn]) -> str:
        values = {
            "prompts": self.prompts,
            "seed": self.config.seed,
            "models": {
                one.config.role: {"uri": one.uri, "sha256": one.sha256} for one in self.models
            },
            "protocols": {
                one.kind: {"id": one.id, **dataclasses.asdict(one)} for one in self.protocols
            },
            "columns": [
                {
                    "model": one.role,
                    "steps": one.steps,
                    "scores": {
                        kind: {"mean": one.mean(kind), "images": values}
                        for kind, values in one.scores.items()
                    },
                }
                for one in columns
            ],
        }
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def prepare(config: SheetConfig) -> SheetPlan:
    """Load and check everything a sheet needs but the text encoder, without touching a cluster.

    Raises:
        InvalidInputError: something missing or damaged, models that take no prompts or do not
            belong together, storage or MLflow out of reach.
    """
    check_run_name("run.name", config.run.name)
    storage_uri = storage.absolute(config.run.storage_uri, "run.storage_uri")
    storage.check_reachable(storage_uri, "run.storage_uri")
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    prompts = read_prompts(config.prompts_uri)
    student = _model("student", config.student_uri)
    models: tuple[ArtifactInfo, ...] = (student,)
    if config.teacher_uri is not None:
        teacher = _model("teacher", config.teacher_uri)
        other = f"the student's teacher has sha256 {student.config.teacher_sha256}, this one "
        require(
            student.config.teacher_sha256 == teacher.sha256,
            "teacher_uri",
            config.teacher_uri,
            f"{other}{teacher.sha256}",
            "Give the teacher the student was distilled from, or none",
        )
        models = (teacher, student)
    protocols = tuple(
        ScoreProtocol(
            kind=one.kind,
            weights_sha256=load_scorer(one, f"scores.{number}").sha256,
            prompts_sha256=prompts_sha256(prompts),
            prompts=len(prompts),
            seed=config.seed,
            nfe=config.nfe,
            teacher_steps=None if config.teacher_uri is None else config.teacher_steps,
        )
        for number, one in enumerate(config.built_scores())
    )
    folder_uri = storage.join(storage_uri, config.run.name)
    return SheetPlan(config, folder_uri, prompts, models, protocols)


def _model(role: str, uri: str) -> ArtifactInfo:
    field = f"{role}_uri"
    found = read_artifact(uri, field)
    its = found.config.role
    require(its == role, field, uri, f"it is a {its}", f"Give a {role}'s artefact")
    classes = found.config.architecture.num_classes
    problem = f"it draws {classes} classes, not prompts"
    require(classes == 0, field, uri, problem, "Use jobs/evaluate.py, which makes a sheet of them")
    check_text_encoder(field, found)
    return found


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Of the prompts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def evaluations(config: ArtifactConfig, steps: int) -> str:
    """How often a teacher's network is asked for a picture: ``2×40``, if all steps are guided."""
    guided = int(config.guidance.rows(time_grid(steps, config.shift)[:-1]).sum())
    if guided == steps:
        return f"2×{steps} evaluations"
    return f"{steps + guided} evaluations in {steps} steps" if guided else f"{steps} steps"


def draw(plan: SheetPlan) -> list[Drawn]:
    """All columns, in a process with room for one model after the other."""
    config, drawn = plan.config, list[Drawn]()
    device = "cuda" if config.gpu else "cpu"
    seeds = [config.seed * SEED_STRIDE + row for row in range(len(plan.prompts))]
    for model in plan.models:
        generator = Generator.load(model.uri, device)
        of_teacher = model.config.role == "teacher"
        for steps in (config.teacher_steps,) if of_teacher else config.nfe:
            images: list[Tensor] = []
            for start in range(0, len(seeds), config.batch_size):
                rows = slice(start, start + config.batch_size)
                # Each by itself: a view would send its batch along.
                batch = generator.generate(plan.prompts[rows], seeds[rows], steps)
                images += [image.clone() for image in batch]
            drawn.append(Drawn(role=model.config.role, steps=steps, images=images, scores={}))
            print(f"{model.config.role} at {steps} step(s): {len(images)} pictures", flush=True)
        del generator
    for score in config.built_scores():
        scorer = load_scorer(score).to(device)
        for column in drawn:
            column.scores[score.kind] = scorer(column.images, plan.prompts)
    return drawn
