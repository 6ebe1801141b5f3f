"""What an evaluation is told, and whether its inputs belong together."""

from __future__ import annotations

from dataclasses import dataclass

from facm_core.errors import require, require_one_of
from facm_platform.config.sections import DataConfig, RunConfig, require_step_counts
from facm_platform.evaluation.engine import PARTS
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.extractors import FITTED, KINDS
from facm_platform.evaluation.protocol import LABEL_POLICIES, PUBLISHED, label_policy
from facm_platform.evaluation.real import image_shape
from facm_platform.latents import LatentManifest
from facm_platform.registry import ArtifactInfo
from facm_platform.registry.generator import check_text_encoder
from facm_platform.registry.versions import check_model_name


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Recipe of jobs/evaluate.py.

    Attributes:
        run: Name and place of the results.
        data: The latent set, which is the reference.
        student_uri: Model artefact to measure.
        teacher_uri: Its teacher, to compare with; None for the student alone.
        extractor: Kind of the feature extractor: ``fitted`` (by jobs/fit_features.py),
            ``inception`` (v3, as FID means it) or ``dinov2``.
        features_uri: Its folder; of Inception, the file of weights.
        reference_uri: What the samples are compared with: an ``.npz`` of ADM's, or a file that
            jobs/reference.py wrote; one that is not there yet is made of every row of the latent
            set. None: in the run's folder.
        protocol: Name of the published protocol that this must be, e.g. ``adm-imagenet256-50k``;
            what differs is refused.
        label_policy: ``balanced`` or ``random`` labels; ``rows``, each sample of the text of a row.
            None: balanced, or rows where rows have texts.
        samples: Number of samples; a multiple of the number of classes where labels are balanced.
        nfe: Step counts of the student.
        teacher_nfe: Step counts of the teacher (Euler; guided steps call the network twice).
        batch_size: Samples an actor computes at once: memory and speed only.
        actors: Ray actors, one CPU each.
        gpu: One GPU for each actor.
        seed: Of all noise; part of the protocol.
        register_as: Register the student under this name, as challenger; None: do not.
    """

    run: RunConfig
    data: DataConfig
    student_uri: str
    teacher_uri: str | None = None
    extractor: str = FITTED
    features_uri: str
    reference_uri: str | None = None
    protocol: str | None = None
    label_policy: str | None = None
    samples: int = 5000
    nfe: tuple[int, ...] = (1, 2, 4)
    teacher_nfe: tuple[int, ...] = (1, 2, 4, 50)
    batch_size: int = 64
    actors: int = 2
    gpu: bool = False
    seed: int = 0
    register_as: str | None = None

    def __post_init__(self) -> None:
        require_one_of("extractor", self.extractor, KINDS)
        if self.label_policy is not None:
            require_one_of("label_policy", self.label_policy, LABEL_POLICIES)
        if self.protocol is not None:
            require_one_of("protocol", self.protocol, tuple(PUBLISHED))
        for name in ("batch_size", "actors"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")
        for name in ("nfe", "teacher_nfe"):
            require_step_counts(name, getattr(self, name))
        if self.register_as is not None:
            check_model_name("register_as", self.register_as)


def check_together(
    config: EvaluateConfig,
    manifest: LatentManifest,
    features: Extractor,
    student: ArtifactInfo,
    teacher: ArtifactInfo | None,
) -> None:
    """Raise `InvalidInputError` unless these inputs belong together."""
    _check_student(config, manifest, student)
    if teacher is not None:
        _check_teacher(config, manifest, student, teacher)
    # Last: where data.uri is the wrong set, it is the student that says so.
    check_measure(config.samples, features, manifest, config.label_policy)
    if config.register_as is not None and student.config.architecture.num_classes == 0:
        check_text_encoder("student_uri", student)


def check_measure(
    samples: int, features: Extractor, manifest: LatentManifest, policy: str | None = None
) -> None:
    """Raise `InvalidInputError` unless the FID can be measured on this latent set.

    Args:
        samples: Number of samples.
        features: The extractor.
        manifest: Of the set.
        policy: See `label_policy`.
    """
    few = f"too few for {PARTS} parts, whose spread is the error of the FID"
    require(samples >= 2 * PARTS, "samples", samples, few, f"Use at least {2 * PARTS}")
    if label_policy(manifest, policy) == "balanced":
        classes = manifest.num_classes
        require(
            samples % classes == 0,
            "samples",
            samples,
            f"not a multiple of the {classes} classes, which get equally many each",
            f"Use e.g. {-(-samples // classes) * classes}",
        )
    features.check("features_uri", image_shape(manifest), manifest)


def _check_student(config: EvaluateConfig, manifest: LatentManifest, student: ArtifactInfo) -> None:
    _check_model("student_uri", config.student_uri, "student", student, manifest)
    require(
        student.config.latent_manifest_sha256 == manifest.sha256,
        "student_uri",
        config.student_uri,
        f"it was trained on the latent set {student.config.latent_manifest_sha256 or '?':.12}…, "
        f"data.uri is {manifest.sha256[:12]}…",
        "Use the latent set of its training",
    )


def _check_teacher(
    config: EvaluateConfig, manifest: LatentManifest, student: ArtifactInfo, teacher: ArtifactInfo
) -> None:
    assert config.teacher_uri is not None
    _check_model("teacher_uri", config.teacher_uri, "teacher", teacher, manifest)
    require(
        student.config.teacher_sha256 == teacher.sha256,
        "teacher_uri",
        config.teacher_uri,
        f"the student's teacher has sha256 {student.config.teacher_sha256}, this one "
        f"{teacher.sha256}",
        "Give the teacher the student was distilled from, or none",
    )


def _check_model(
    field: str, uri: str, role: str, artifact: ArtifactInfo, manifest: LatentManifest
) -> None:
    config = artifact.config
    same_set = "Use the latent set of its training"
    require(config.role == role, field, uri, f"it is a {config.role}", f"Give a {role}'s artefact")
    for what, ours, theirs in (
        ("latents", config.latent_shape, tuple(manifest.latent_shape)),
        ("classes", config.architecture.num_classes, manifest.num_classes),
        ("texts", tuple(config.architecture.text_shape), tuple(manifest.text_shape)),
        ("mean", config.normalisation_mean, manifest.mean),
        ("std", config.normalisation_std, manifest.std),
        ("autoencoder", config.autoencoder_sha256, manifest.autoencoder_sha256),
    ):
        problem = f"its {what} are {ours}, those of data.uri {theirs}"
        require(ours == theirs, field, uri, problem, same_set)
