"""Distillation of a teacher into a student of 1 to 8 steps: by FACM, MeanFlow or sCM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.models import Architecture, WanConfig
from facm_core.objectives import FACMConfig, MeanFlowConfig, SCMConfig
from facm_platform import storage
from facm_platform.config import JobResult, config_hash, revised
from facm_platform.config.sections import DataConfig, RunConfig, TeacherConfig
from facm_platform.evaluation.config import check_measure
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.evaluation.reference import find_reference
from facm_platform.latents import LatentManifest
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.registry import ArtifactInfo, read_artifact
from facm_platform.training.config import (
    LoraConfig,
    TrainConfig,
    ValidationConfig,
    WorkersConfig,
)
from facm_platform.training.lora import check_lora
from facm_platform.training.ray_context import MakeContext, RayContext
from facm_platform.training.run import (
    check_batch,
    check_run,
    cost_estimate,
    execute,
    open_data,
)
from facm_platform.training.task import SAME, STUDENTS, Stage, TrainingTask

JOB = "distill"
_NAMES = {FACMConfig: "facm", MeanFlowConfig: "mean_flow", SCMConfig: "scm"}
_CHANGING = ("train.learning_rate", "train.max_grad_norm")
_SECTIONS = ("objective", "mean_flow", "scm")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Recipe of jobs/distill.py.

    Attributes:
        run: Name and place of the run.
        data: Latent set.
        teacher: Frozen teacher; the student starts from its weights.
        student: ``same``: a network like the teacher. Where the teacher is a pair of experts, also
            ``high_noise`` or ``low_noise``: one network for all times, which starts as that one.
        lora: Low-rank adapters, which are trained in place of the weights that the student starts
            with; the artefact holds both, merged. None: the weights are trained.
        objective: FACM; the method where none is given.
        mean_flow: MeanFlow in its place, for comparison.
        scm: sCM in its place, for comparison.
        train: Optimisation.
        stages: Values that change on the way: mappings of ``from_images``, in ascending order, and
            of what is in force from then on, ``train.learning_rate``, ``train.max_grad_norm`` or
            keys of the method's section (``objective.lambda_fm``), sCM's and all ``conditioning``
            excepted.
        workers: Ray Train workers.
        validation: The FID of every checkpoint. None: it is not measured.
    """

    run: RunConfig
    data: DataConfig
    teacher: TeacherConfig
    student: str = SAME
    lora: LoraConfig | None = None
    objective: FACMConfig | None = None
    mean_flow: MeanFlowConfig | None = None
    scm: SCMConfig | None = None
    train: TrainConfig
    stages: tuple[Any, ...] = ()
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    validation: ValidationConfig | None = None

    def __post_init__(self) -> None:
        require_one_of("student", self.student, STUDENTS)
        given = [name for name in _SECTIONS if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, "objective", FACMConfig())  # frozen, and shown to the user
        require(
            len(given) <= 1,
            given[0] if given else "",
            "given",
            f"{' and '.join(given)} are methods, each in place of the others",
            "Give one of them",
        )

    @property
    def method(self) -> FACMConfig | MeanFlowConfig | SCMConfig:
        """The one that is given."""
        return cast(FACMConfig | MeanFlowConfig | SCMConfig, getattr(self, self.section))

    @property
    def second_time(self) -> bool:
        """Whether the method needs a network with two times."""
        match self.method:
            case FACMConfig(conditioning=conditioning):
                return conditioning == "auxiliary"
            case MeanFlowConfig():
                return True
            case SCMConfig():
                return False

    @property
    def section(self) -> str:
        """Its name in the recipe."""
        return next(name for name in _SECTIONS if getattr(self, name) is not None)

    def built_stages(self) -> tuple[Stage, ...]:
        """The stages, each with all that is in force then.

        Raises:
            InvalidInputError: they are not in order, or change what cannot change.
        """
        config, built = replace(self, stages=()), list[Stage]()
        for number, given in enumerate(self.stages):
            values = dict(given) if isinstance(given, Mapping) else {}
            start, before = values.pop("from_images", None), built[-1].from_images if built else 0
            require(
                isinstance(start, int) and start > before and bool(values),
                f"stages.{number}",
                given,
                f"no mapping of from_images, above {before}, and of values",
                "Use e.g. {from_images: 25600, objective.lambda_fm: 0.1}",
            )
            for key in values:
                section, _, rest = key.partition(".")
                varies = section == self.section != "scm" and rest != "conditioning"
                require(
                    varies or key in _CHANGING,
                    f"stages.{number}",
                    key,
                    "it cannot change in mid-run",
                    f"Use {' or '.join(_CHANGING)}, or a value of the method that may",
                )
            try:
                config = revised(config, values)
            except InvalidInputError as error:
                raise error.inside(f"stages.{number}") from None
            built.append(Stage(start, config.method, config.train))
        return tuple(built)


@dataclass(frozen=True)
class DistillPlan:
    """A validated distillation.

    Attributes:
        config: What was asked for.
        folder_uri: Of the run.
        data_uri: Of the latent set, absolute.
        manifest: Of the latent set.
        teacher: The teacher.
        validation: With absolute addresses.
        start_uri: Checkpoint that the run begins with, of one that was the same so far.
    """

    config: DistillConfig
    folder_uri: str
    data_uri: str
    manifest: LatentManifest
    teacher: ArtifactInfo
    validation: ValidationConfig | None
    start_uri: str | None = None

    @property
    def architecture(self) -> Architecture:
        """The student's: the teacher's, or that of one of its experts, with the times it needs."""
        config, architecture = self.config, self.teacher.config.architecture
        if isinstance(architecture, WanConfig):
            return architecture if config.student == SAME else replace(architecture, boundary=None)
        # sCM takes the teacher's times as they are.
        second_time = config.second_time or (config.scm is not None and architecture.second_time)
        return replace(architecture, second_time=second_time)

    def describe(self) -> str:
        """What would be distilled, from what."""
        config, train = self.config, self.config.train
        return (
            f"distill {config.run.name}: {train.total_images:,} images in batches of "
            f"{train.global_batch_size} on {config.workers.max} workers, from {self.data_uri} "
            f"({self.manifest.rows:,} rows) to {self.folder_uri}\n"
            f"teacher: {self.teacher.uri} (sha256 {self.teacher.sha256})\n"
            f"guidance: {self._guidance}\n"
            + cost_estimate(
                self.architecture,
                train,
                config.workers,
                teachers=self.teacher.config.architecture.networks,
                lora=config.lora,
            )
        )

    @property
    def _guidance(self) -> str:
        """With which the teacher is asked, and what it recommends if that is something else."""
        asked, own = self.config.method.guidance, self.teacher.config.guidance
        told = f"{asked.scale} on [{asked.low}, {asked.high}]"
        if asked == own:
            return told
        return f"{told}; the teacher recommends {own.scale} on [{own.low}, {own.high}]"

    def execute(
        self, tags: Mapping[str, str] | None = None, make_context: MakeContext = RayContext
    ) -> JobResult:
        """Distill on the cluster; `tags` are further ones of the MLflow run.

        `make_context`: see `launch`.
        """
        config = self.config
        return execute(
            config.run,
            config,
            config.workers,
            job=JOB,
            lineage=lineage(self.manifest, self.teacher),
            make_task=self.task,
            tags=tags,
            make_context=make_context,
        )

    @property
    def _conditioning(self) -> str:
        if self.architecture.second_time:
            return "auxiliary"
        return "expanded" if isinstance(self.config.method, FACMConfig) else "plain"

    def task(self, tracking_uri: str, run_id: str) -> TrainingTask:
        """The worker's view of it."""
        config, method, own = self.config, self.config.method, self.teacher.config
        encoder = (own.text_encoder_id, own.text_encoder_sha256)
        if not own.text_encoder_id and (null := _null_text(config, self.manifest)):
            encoder = (null.encoder_id, null.encoder_sha256)
        artifact = replace(
            own,
            text_encoder_id=encoder[0],
            text_encoder_sha256=encoder[1],
            role="student",
            architecture=self.architecture,
            objective=_NAMES[type(method)],
            conditioning=self._conditioning,
            guidance_scale=method.guidance.scale,
            guidance_low=method.guidance.low,
            guidance_high=method.guidance.high,
            recommended_nfe=(1, 2, 4),
            latent_manifest_sha256=self.manifest.sha256,
            teacher_sha256=self.teacher.sha256,
            images_seen=config.train.total_images,
            ema_sigma_rel=config.train.export_sigma_rel,
            config_hash=config_hash(config),
        )
        return TrainingTask(
            job=JOB,
            folder_uri=self.folder_uri,
            stream=config.train.stream(self.data_uri, self.manifest),
            objective=method,
            train=config.train,
            stages=config.built_stages(),
            teacher_uri=self.teacher.uri,
            student=config.student,
            lora=config.lora,
            artifact=artifact,
            tracking_uri=tracking_uri,
            run_id=run_id,
            validation=self.validation,
            start_uri=self.start_uri,
        )


def prepare(config: DistillConfig) -> DistillPlan:
    """Validate a distillation without touching a cluster.

    Raises:
        InvalidInputError: see `check_run`, `check_fit`, `open_data`, `read_artifact`;
            or teacher, data and conditioning that do not belong together.
    """
    data_uri, manifest = open_data(config.data)
    teacher = read_artifact(config.teacher.uri, "teacher.uri")
    check_fit(config, teacher, manifest)
    folder_uri = check_run(config.run, config, lineage(manifest, teacher))
    validation = _checked(config.validation, manifest)
    return DistillPlan(config, folder_uri, data_uri, manifest, teacher, validation)


def lineage(manifest: LatentManifest, teacher: ArtifactInfo) -> dict[str, str]:
    """What a student is made from."""
    return {"manifest_sha256": manifest.sha256, "teacher_sha256": teacher.sha256}


def _checked(config: ValidationConfig | None, manifest: LatentManifest) -> ValidationConfig | None:
    """With an absolute address, after making sure that it can be measured."""
    if config is None:
        return None
    try:
        features = load_extractor(config.extractor, config.features_uri)
        check_measure(config.samples, features, manifest)
        reference_uri = config.reference_uri
        if reference_uri is not None:
            reference_uri = find_reference(reference_uri, features, manifest).uri
    except InvalidInputError as error:
        raise error.inside("validation") from None
    return replace(config, features_uri=features.uri, reference_uri=reference_uri)


def check_fit(config: DistillConfig, teacher: ArtifactInfo, manifest: LatentManifest) -> None:
    """Raise `InvalidInputError` unless workers, batches, teacher and data belong together."""
    check_batch(config.train, config.workers)
    config.built_stages()
    architecture, method = teacher.config.architecture, config.method
    expanded = isinstance(method, FACMConfig) and method.conditioning == "expanded"
    uri = config.teacher.uri
    require(
        architecture.latent_shape == tuple(manifest.latent_shape),
        "teacher.uri",
        uri,
        f"the teacher's latents are {architecture.latent_shape}, those of data.uri "
        f"{tuple(manifest.latent_shape)}",
        "Use the latent set the teacher was trained on",
    )
    require(
        _read(architecture) == _read(manifest),
        "teacher.uri",
        uri,
        f"the teacher has {_read(architecture)}, data.uri {_read(manifest)}",
        "Use the latent set the teacher was trained on",
    )
    _check_text_encoder(config, teacher, manifest)
    ours, theirs = teacher.config.autoencoder_sha256, manifest.autoencoder_sha256
    require(
        ours == theirs,
        "teacher.uri",
        uri,
        f"its latents are those of the autoencoder {ours[:12]}…, data.uri has those of "
        f"{theirs[:12]}…",
        "Use a latent set that the teacher's autoencoder made",
    )
    # Another normalisation is the costliest silent error there is: FID above 130.
    require(
        (teacher.config.normalisation_mean, teacher.config.normalisation_std)
        == (manifest.mean, manifest.std),
        "teacher.uri",
        uri,
        "the teacher was trained under another normalisation than data.uri has",
        "Use the latent set the teacher was trained on",
    )
    require(
        not (architecture.second_time and expanded),
        "objective.conditioning",
        "expanded",
        "the teacher has a second time embedding, which this conditioning has no use for",
        "Use auxiliary",
    )
    require(
        config.student == SAME or architecture.networks == 2,
        "student",
        config.student,
        "the teacher is one network, not a pair of experts",
        f"Use {SAME}",
    )
    require(
        not (config.second_time and isinstance(architecture, WanConfig)),
        "teacher.uri",
        uri,
        f"a Wan reads one time, and {config.section} with this conditioning needs two",
        "Use objective.conditioning=expanded, or scm",
    )
    if config.lora is not None:
        require(
            architecture.second_time or not config.second_time,
            "lora",
            "given",
            f"{config.section} with this conditioning adds a second time embedding to the student, "
            "which adapters would leave as it is, without effect",
            "Use objective.conditioning=expanded, or scm, or train all weights: lora=null",
        )
        check_lora(config.lora, architecture)


def _null_text(config: DistillConfig, manifest: LatentManifest) -> NullText | None:
    """The set's null prompt; None where it has labels, or nobody wrote one."""
    uri = storage.absolute(config.data.uri, "data.uri")
    if not manifest.text_shape or not storage.exists(storage.join(uri, NULL_TEXT)):
        return None
    return NullText.load(uri, manifest)


def _check_text_encoder(
    config: DistillConfig, teacher: ArtifactInfo, manifest: LatentManifest
) -> None:
    """Prompts must mean to the teacher what they meant when it was trained, if that is known."""
    null = _null_text(config, manifest)
    if null is None:
        return
    known, ours = teacher.config.text_encoder_sha256, null.encoder_sha256
    require(
        not (known and ours) or known == ours,
        "data.uri",
        config.data.uri,
        f"its prompts were embedded by {null.encoder_id} ({ours[:12]}…), those of the teacher by "
        f"{teacher.config.text_encoder_id} ({known[:12]}…)",
        "Embed them with the teacher's text encoder",
    )


def _read(source: Architecture | LatentManifest) -> str:
    """What a network reads beside a latent, or what a set has."""
    if source.text_shape:
        return f"texts {tuple(source.text_shape)}"
    return f"{source.num_classes} classes"
