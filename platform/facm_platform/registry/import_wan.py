"""Wan as diffusers keeps it -> a teacher: its weights, with the null prompt."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from facm_core.autoencoders import WanAutoencoder
from facm_core.errors import InvalidInputError, require
from facm_core.guidance import GuidanceConfig
from facm_core.models import WanConfig, build_network
from facm_core.text_encoders import MODEL
from facm_platform import storage
from facm_platform.config import JobResult, config_hash
from facm_platform.config.sections import RunConfig
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.null_text import NullText
from facm_platform.latents.text_encoder import (
    TextEncoderInfo,
    find_text_encoder,
    open_text_encoder,
)
from facm_platform.registry.artifact import ArtifactConfig, upload_artifact, write_artifact
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

JOB = "import_wan"
_CONFIG, _PIPELINE = "config.json", "model_index.json"
_VAE, _SCHEDULER = "vae", "scheduler/scheduler_config.json"
_REMEDY = "Give the folder of a whole Wan pipeline, as diffusers saves it"

_FRAMES = 4
"""Of a video, to a latent frame."""

Parts = dict[str, str]
"""Addresses of the networks, by the prefix that their tensors have in the artefact."""


@dataclass(frozen=True, kw_only=True)
class ImportWanConfig:
    """What `jobs/import_wan.py` takes.

    Attributes:
        run: Name and tracking.
        source_uri: Folder of the pipeline, local or ``s3://``; the teacher's prompts are embedded
            and its latents decoded by what lies in it.
        height: Pixels of an image.
        width: Pixels of an image.
        frames: Of a video, 1 + 4·k; 1 for images.
        tokens: Length of an embedded prompt.
        sampling: Guidance with which the teacher is meant to be sampled.
        output_uri: Empty folder or ``s3://`` address for the teacher.
    """

    run: RunConfig
    source_uri: str
    height: int
    width: int
    frames: int = 1
    tokens: int = 512
    sampling: GuidanceConfig = field(default_factory=GuidanceConfig)
    output_uri: str

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "tokens"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        fits = self.frames % _FRAMES == 1
        problem = f"the first frame is a latent one, and then every {_FRAMES} are"
        require(fits, "frames", self.frames, problem, f"Use 1 + {_FRAMES}·k, e.g. 1 or 81")


@dataclass(frozen=True)
class ImportWanPlan:
    """A validated import.

    Attributes:
        config: What was asked for.
        parts: Of the pipeline.
        architecture: Of the teacher.
        autoencoder: The pipeline's.
        encoder: The pipeline's text encoder.
        shift: Time shift of its scheduler, see `facm_core.samplers`.
        output_uri: Absolute.
    """

    config: ImportWanConfig
    parts: Parts
    architecture: WanConfig
    autoencoder: WanAutoencoder
    encoder: TextEncoderInfo
    shift: float
    output_uri: str

    @cached_property
    def null(self) -> NullText:
        """The null prompt, embedded when it is first asked for."""
        encoder = self.encoder
        tokens = self.config.tokens
        return NullText.of(open_text_encoder(encoder.id, tokens, encoder.sha256, "source_uri"))

    def describe(self) -> str:
        """What would be imported."""
        parts, shape = " and ".join(self.parts.values()), self.architecture.latent_shape
        return f"import {parts} for latents {shape} to {self.output_uri}"

    def execute(self) -> JobResult:
        """Write the artefact."""
        print(self.describe(), flush=True)
        config, run = self.config, self.config.run
        store = connect_store(run.tracking, embedded_root(run.storage_uri))
        made_from = {
            "autoencoder_sha256": self.autoencoder.sha256,
            "text_encoder_sha256": self.encoder.sha256,
            "null_text_sha256": self.null.sha256,
        }
        with (
            open_run(store, run.name, job=JOB, config=config, tags=made_from) as tracked,
            tempfile.TemporaryDirectory() as folder,
        ):
            sha256 = write_artifact(Path(folder), self._weights(), self._artifact())
            upload_artifact(Path(folder), self.output_uri)
            # By which those that are made from it name it.
            tracked.set_tags({"model_sha256": sha256})
        return JobResult(
            run_id=tracked.run_id,
            run_name=run.name,
            artifact_uri=self.output_uri,
            metrics={"networks": float(self.architecture.networks)},
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """One after the other: together they may be larger than this machine's memory."""
        for name, file, key in _stored(self.parts):
            yield name, file.get_tensor(key)
        for prefix in self.parts:
            yield f"{prefix}null_text_embedding", self.null.text_embedding
            yield f"{prefix}null_text_mask", self.null.text_mask

    def _artifact(self) -> ArtifactConfig:
        config, autoencoder = self.config, self.autoencoder
        mean, std = autoencoder.normalisation
        return ArtifactConfig(
            role="teacher",
            architecture=self.architecture,
            objective="flow_matching",
            conditioning="plain",
            guidance_scale=config.sampling.scale,
            guidance_low=config.sampling.low,
            guidance_high=config.sampling.high,
            recommended_nfe=(50,),
            shift=self.shift,
            normalisation_mean=mean,
            normalisation_std=std,
            autoencoder_id=autoencoder.id,
            autoencoder_sha256=autoencoder.sha256,
            text_encoder_id=self.encoder.id,
            text_encoder_sha256=self.encoder.sha256,
            latent_manifest_sha256=None,
            images_seen=0,
            ema_sigma_rel=0.0,
            config_hash=config_hash(config),
        )


def prepare(config: ImportWanConfig) -> ImportWanPlan:
    """Check everything but the numbers in the weights.

    Raises:
        InvalidInputError: no pipeline there, not one of Wan from text alone, missing or unexpected
            tensors (all of them listed), an autoencoder or a text encoder that is none or does not
            fit the network, sizes that they do not divide, or an output that is not empty.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    source_uri = storage.absolute(config.source_uri, "source_uri")
    output_uri = storage.empty_folder(config.output_uri, "output_uri")
    parts, boundary = _parts(source_uri)
    shift = _shift(source_uri)
    encoder = find_text_encoder(source_uri, config.tokens, field="source_uri")
    autoencoder = _autoencoder(source_uri)
    found = [_architecture(uri, config, autoencoder, encoder, boundary) for uri in parts.values()]
    same = all(one == found[0] for one in found)
    require(same, "source_uri", source_uri, "its two networks are not of one size", _REMEDY)
    _check_names(parts, found[0], source_uri)
    return ImportWanPlan(config, parts, found[0], autoencoder, encoder, shift, output_uri)


def _parts(source_uri: str) -> tuple[Parts, float | None]:
    """The networks, and the boundary between two."""
    storage.check_reachable(source_uri, "source_uri")
    pipeline = _json(storage.join(source_uri, _PIPELINE))
    boundary = pipeline.get("boundary_ratio")
    first, second = (storage.join(source_uri, name) for name in ("transformer", "transformer_2"))
    has_second = storage.exists(storage.join(second, _CONFIG))
    require(
        has_second == (boundary is not None),
        "source_uri",
        source_uri,
        f"{_PIPELINE} has boundary_ratio = {boundary}, and there is "
        f"{'a' if has_second else 'no'} transformer_2",
        _REMEDY,
    )
    if has_second:
        return {"high_noise.": first, "low_noise.": second}, boundary
    return {"": first}, None


def _shift(source_uri: str) -> float:
    """The scheduler counts noise levels, the samplers time: one shift is the other's inverse."""
    file = storage.join(source_uri, _SCHEDULER)
    values = _json(file)
    shift = values.get("flow_shift", values.get("shift", 1.0))
    fits = isinstance(shift, int | float) and 0 < shift < math.inf
    require(fits, "source_uri", file, f"its shift is {shift!r}, not a positive number", _REMEDY)
    return 1 / shift


def _autoencoder(source_uri: str) -> WanAutoencoder:
    uri = storage.join(source_uri, _VAE)
    try:
        autoencoder = open_autoencoder(uri)
    except InvalidInputError as error:
        raise InvalidInputError("source_uri", uri, error.problem, error.remedy) from error
    if isinstance(autoencoder, WanAutoencoder):
        return autoencoder
    raise InvalidInputError("source_uri", uri, "it is no autoencoder of Wan", _REMEDY)


def _architecture(
    uri: str,
    config: ImportWanConfig,
    autoencoder: WanAutoencoder,
    encoder: TextEncoderInfo,
    boundary: float | None,
) -> WanConfig:
    file = storage.join(uri, _CONFIG)
    values = _json(file)
    stride, (tokens, features) = autoencoder.stride, encoder.text_shape
    sides = {name: getattr(config, name) for name in ("height", "width")}
    patch_size = values.get("patch_size", WanConfig.patch_size)
    problem = f"patch_size = {patch_size!r} is not three numbers"
    fits = isinstance(patch_size, list | tuple) and len(patch_size) == 3
    require(fits, "source_uri", file, problem, _REMEDY)
    for (name, side), patch in zip(sides.items(), patch_size[1:], strict=True):
        multiple = stride * patch
        problem = f"not a multiple of {multiple}, the pixels of a patch"
        remedy = f"Use e.g. {-(-side // multiple) * multiple}"
        require(side % multiple == 0, name, side, problem, remedy)
    try:
        architecture = WanConfig.from_diffusers(
            values,
            frames=1 + config.frames // _FRAMES,
            text_tokens=tokens,
            boundary=boundary,
            **{name: side // stride for name, side in sides.items()},
        )
    except InvalidInputError as error:
        raise InvalidInputError("source_uri", file, str(error), error.remedy) from error
    for what, ours, theirs, whose in (
        ("channels of a latent", architecture.in_channels, autoencoder.latent_channels, _VAE),
        ("features of a text", architecture.text_dim, features, MODEL),
    ):
        problem = f"the network has {ours} {what}, the pipeline's {whose} {theirs}"
        require(ours == theirs, "source_uri", file, problem, _REMEDY)
    return architecture


def _check_names(parts: Parts, architecture: WanConfig, source_uri: str) -> None:
    with torch.device("meta"):
        tensors = build_network(architecture).state_dict()
    # The null prompt is in none of the files.
    expected = {name: tuple(t.shape) for name, t in tensors.items() if ".network." in f".{name}"}
    found: dict[str, tuple[int, ...]] = {}
    findings = []
    for name, file, key in _stored(parts):
        shape = tuple(file.get_slice(key).get_shape())
        if name in found:
            findings.append(f"{name} is in two files")
        elif name not in expected:
            findings.append(f"unexpected {name}")
        elif shape != expected[name]:
            findings.append(f"{name} is {shape}, not {expected[name]}")
        found[name] = shape
    findings += [f"missing {name}" for name in expected if name not in found]
    problem = f"the tensors are not those of its {_CONFIG}: " + "; ".join(findings)
    require(not findings, "source_uri", source_uri, problem, _REMEDY)


def _stored(parts: Parts) -> Iterator[tuple[str, Any, str]]:
    """Every tensor's name in the artefact, the open file that holds it, and its name there."""
    for prefix, uri in parts.items():
        with storage.node_copy(uri) as folder:
            for path in sorted(folder.glob("*.safetensors")):
                try:
                    with safe_open(path, "pt") as file:
                        for key in file.keys():  # noqa: SIM118  (no dictionary)
                            yield f"{prefix}network.{key}", file, key
                except SafetensorError as error:
                    problem = f"{path.name} cannot be read ({error})"
                    raise InvalidInputError("source_uri", uri, problem, _REMEDY) from error


def _json(uri: str) -> dict[str, Any]:
    try:
        values = dict(json.loads(storage.read_bytes(uri)))
    except (FileNotFoundError, TypeError, ValueError) as error:
        problem = f"not readable ({type(error).__name__})"
        raise InvalidInputError("source_uri", uri, problem, _REMEDY) from error
    return values
