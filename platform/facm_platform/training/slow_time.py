"""A teacher with a slow time embedding: its tangent in t is no larger than its function."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.models import WanConfig, build_network
from facm_core.models.time_scale import (
    TimeFit,
    TimeProfile,
    drop_fast_weights,
    fit_time_embedding,
)
from facm_core.precision import DTYPES
from facm_platform import storage
from facm_platform.config import JobResult, Refused, config_hash
from facm_platform.config.sections import DataConfig, RunConfig, TeacherConfig
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.registry import (
    ArtifactInfo,
    load_artifact,
    read_artifact,
    save_artifact,
    upload_artifact,
)
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)
from facm_platform.tracking.run import Run
from facm_platform.training.distill import lineage
from facm_platform.training.run import open_data

JOB = "slow_time"
_BY_TIME = ("velocity_error", "anchor_error", "partial_rms", "tangent_rms")
_NETWORKS = ("teacher", "before", "after")


@dataclass(frozen=True, kw_only=True)
class SlowTimeConfig:
    """What jobs/slow_time.py takes.

    Attributes:
        run: Name and tracking.
        data: Latent set of the teacher; its rows are used in the report, and for nothing else.
        teacher: A Wan with all its sinusoids, as jobs/import_wan.py wrote it.
        fastest: Sinusoids that are kept turn by at most so many radians per unit of t.
        steps: Of the fit, see `fit_time_embedding`.
        learning_rate: Of its first step.
        rows: Of the report.
        max_velocity_error: Nothing is written if, in some part of [0, 1], the fitted network is
            farther than this from the teacher's velocity, relative to it.
        device: ``cpu`` or ``cuda``.
        precision: Of the networks in the report: ``float32`` or ``bfloat16``. Times are embedded
            and fitted in float32, and what is written is float32.
        seed: Of rows, times and noise.
        output_uri: Empty folder or ``s3://`` address for the new teacher.
    """

    run: RunConfig
    data: DataConfig
    teacher: TeacherConfig
    fastest: float = 20.0
    steps: int = 1000
    learning_rate: float = 1e-3
    rows: int = 16
    max_velocity_error: float = 0.1
    device: str = "cpu"
    precision: str = "float32"
    seed: int = 0
    output_uri: str

    def __post_init__(self) -> None:
        for name in ("steps", "rows"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        for name in ("learning_rate", "max_velocity_error"):
            value = getattr(self, name)
            require(value > 0, name, value, "not positive", "Use a number above 0")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")
        require_one_of("device", self.device, ("cpu", "cuda"))
        require_one_of("precision", self.precision, tuple(DTYPES))


@dataclass(frozen=True)
class SlowTimePlan:
    """A validated warm-up.

    Attributes:
        config: What was asked for.
        data_uri: Of the latent set, absolute.
        manifest: Of the latent set.
        teacher: As it is.
        architecture: Of the new one.
        output_uri: Absolute.
    """

    config: SlowTimeConfig
    data_uri: str
    manifest: LatentManifest
    teacher: ArtifactInfo
    architecture: WanConfig
    output_uri: str

    def describe(self) -> str:
        """What would be made."""
        config = self.config
        return (
            f"{self.teacher.uri} with sinusoids up to {config.fastest:g} radians per unit of t, "
            f"fitted in {config.steps} steps, to {self.output_uri}"
        )

    def execute(self) -> JobResult:
        """Fit, report, and write the artefact.

        Raises:
            Refused: the fitted network is too far from the teacher.
        """
        print(self.describe(), flush=True)
        config, run, made_from = self.config, self.config.run, lineage(self.manifest, self.teacher)
        store = connect_store(run.tracking, embedded_root(run.storage_uri))
        with open_run(store, run.name, job=JOB, config=config, tags=made_from) as tracked:
            fit, weights = self._fit()
            print(table(fit))
            metrics = _log(tracked, fit)
            worst, allowed = metrics["velocity_error"], config.max_velocity_error
            if not all(error <= allowed for error in fit.after.velocity_error):  # or NaN
                raise Refused(
                    f"the fitted network is up to {worst:.3g} of the teacher's velocity away from "
                    f"it, and max_velocity_error is {allowed:g}; nothing was written. Use a higher "
                    "fastest, or more steps",
                    self._result(tracked, tracked.artifact_uri, metrics),
                )
            artifact = replace(
                self.teacher.config,
                architecture=self.architecture,
                teacher_sha256=self.teacher.sha256,
                config_hash=config_hash(config),
            )
            with tempfile.TemporaryDirectory() as folder:
                sha256 = save_artifact(Path(folder), weights, artifact)
                upload_artifact(Path(folder), self.output_uri)
            # By which those that are made from it name it.
            tracked.set_tags({"model_sha256": sha256})
        return self._result(tracked, self.output_uri, metrics)

    def _result(self, tracked: Run, uri: str, metrics: dict[str, float]) -> JobResult:
        return JobResult(
            run_id=tracked.run_id,
            run_name=self.config.run.name,
            artifact_uri=uri,
            metrics=metrics,
        )

    def _fit(self) -> tuple[TimeFit, dict[str, Tensor]]:
        """And the new teacher's weights: the teacher's, but for the time MLPs."""
        config, teacher = self.config, load_artifact(self.teacher.uri).model
        weights = dict(teacher.state_dict())
        islands = {p for embedder in teacher.time_embedders for p in embedder.parameters()}
        for parameter in set(teacher.parameters()) - islands:
            parameter.data = parameter.data.to(DTYPES[config.precision])
        device = torch.device(config.device)
        teacher.to(device)
        with torch.device("meta"):
            student: Any = build_network(self.architecture)
        # The teacher's own tensors, since two networks may be more than a machine holds.
        student.load_state_dict(teacher.state_dict(), assign=True)
        student.eval().requires_grad_(False).to(device)
        for embedder in student.time_embedders:
            for parameter in embedder.requires_grad_().parameters():
                parameter.data = parameter.data.clone()
        drop_fast_weights(student)
        stream = LatentStream(self.data_uri, self.manifest, config.seed)
        (batch,) = local_batches(stream, 0, config.rows, config.rows)
        batch = batch.to(device)
        fit = fit_time_embedding(
            student,
            teacher,
            batch.latents,
            batch.condition,
            steps=config.steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
        return fit, weights | {n: p for n, p in student.named_parameters() if p.requires_grad}


def prepare(config: SlowTimeConfig) -> SlowTimePlan:
    """Check everything but how good the fit is.

    Raises:
        InvalidInputError: bad name, MLflow out of reach, an output that is not empty; no latent
            set, no teacher there, or a teacher that is none, of other latents, no Wan or slow
            already; no sinusoid as slow as `fastest`; or no GPU where one is asked for.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    output_uri = storage.empty_folder(config.output_uri, "output_uri")
    available = config.device == "cpu" or torch.cuda.is_available()
    require(available, "device", config.device, "PyTorch sees no GPU here", "Use cpu")
    data_uri, manifest = open_data(config.data)
    teacher = read_artifact(config.teacher.uri)
    architecture = _slow(config, teacher, manifest)
    return SlowTimePlan(config, data_uri, manifest, teacher, architecture, output_uri)


def _slow(config: SlowTimeConfig, teacher: ArtifactInfo, manifest: LatentManifest) -> WanConfig:
    """The new teacher's architecture."""
    uri, described, architecture = config.teacher.uri, teacher.config, teacher.config.architecture
    is_one = described.role == "teacher"
    require(is_one, "teacher.uri", uri, f"it is a {described.role}", "Give a teacher's artefact")
    if not isinstance(architecture, WanConfig):
        raise InvalidInputError("teacher.uri", uri, "its network is no Wan", "Distill it as it is")
    own = architecture.fastest
    require(
        own is None,
        "teacher.uri",
        uri,
        f"its sinusoids are no faster than {own} already",
        "Give the teacher that it was made from, or distill it as it is",
    )
    for what, ours, theirs in (
        ("latents", described.latent_shape, tuple(manifest.latent_shape)),
        ("texts", architecture.text_shape, tuple(manifest.text_shape)),
        ("mean", described.normalisation_mean, manifest.mean),
        ("std", described.normalisation_std, manifest.std),
        ("autoencoder", described.autoencoder_sha256, manifest.autoencoder_sha256),
    ):
        problem = f"its {what} are {ours}, those of data.uri {theirs}"
        require(ours == theirs, "teacher.uri", uri, problem, "Use the latent set of its import")
    slow = replace(architecture, fastest=config.fastest)
    with torch.device("meta"):
        build_network(slow)
    return slow


# --- the report -----------------------------------------------------------------------------------


def table(fit: TimeFit) -> str:
    """As text, one line for each part of [0, 1]."""
    heads = ["t"]
    columns: list[tuple[float, ...]] = [fit.after.times]
    for name, title in zip(_BY_TIME, ("velocity", "anchor", "∂F/∂t", "dF/dt"), strict=True):
        for network, profile in _profiles(fit):
            if network != "teacher" or name.endswith("rms"):
                heads.append(f"{title} {network}")
                columns.append(getattr(profile, name))
    widths = [max(len(head), 8) for head in heads]
    lines = ["  ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
    for row in zip(*columns, strict=True):
        cells = (f"{value:.4g}".rjust(width) for value, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells))
    errors = f"{fit.before.embedding_error:.4g} before, {fit.after.embedding_error:.4g} after"
    return "\n".join([*lines, f"relative error of the embedding: {errors}"])


def _log(tracked: Run, fit: TimeFit) -> dict[str, float]:
    """Keep figures by time (steps are thousandths of t), JSON and plot; the worst and the mean."""
    for i, time in enumerate(fit.after.times):
        by_time = {
            f"{name}/{network}": getattr(profile, name)[i]
            for network, profile in _profiles(fit)
            for name in _BY_TIME
        }
        tracked.log_metrics(by_time, images_seen=round(1000 * time))
    before, after = fit.before, fit.after
    metrics = {
        "embedding_error_before": before.embedding_error,
        "embedding_error": after.embedding_error,
        "velocity_error": max(after.velocity_error),
        "anchor_error": max(after.anchor_error),
        "tangent_rms_teacher": _mean(fit.teacher.tangent_rms),
        "tangent_rms": _mean(after.tangent_rms),
    }
    tracked.log_metrics(metrics, images_seen=0)
    tracked.log_text(json.dumps(asdict(fit), indent=2), f"{JOB}.json")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / f"{JOB}.png"
        picture.write_bytes(_plot(fit))
        tracked.log_artifact(picture)
    return metrics


def _plot(fit: TimeFit) -> bytes:
    """PNG: derivatives of the three networks, and how far two of them are from the first."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {
        "tangent_rms": "RMS of dF/dt along (v, 1)",
        "partial_rms": "RMS of ∂F/∂t",
        "velocity_error": "error of the velocity, — at t, - - at 2 − t",
    }
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for number, (network, profile) in enumerate(_profiles(fit)):
            colour = f"C{number}"
            if name.endswith("rms"):
                axes.semilogy(profile.times, getattr(profile, name), color=colour, label=network)
            elif network != "teacher":
                axes.plot(profile.times, profile.velocity_error, color=colour, label=network)
                axes.plot(profile.times, profile.anchor_error, "--", color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("t")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _profiles(fit: TimeFit) -> Iterator[tuple[str, TimeProfile]]:
    return ((network, getattr(fit, network)) for network in _NETWORKS)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
