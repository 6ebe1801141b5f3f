"""Wan as diffusers keeps it -> a teacher: its weights, with the null prompt of a latent set."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from facm_core.errors import InvalidInputError, require
from facm_core.guidance import GuidanceConfig
from facm_core.models import WanConfig, build_network
from facm_platform import storage
from facm_platform.config import JobResult, config_hash
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.null_text import NullText
from facm_platform.registry.artifact import ArtifactConfig, write_artifact
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

JOB = "import_wan"
_CONFIG, _PIPELINE = "config.json", "model_index.json"
_REMEDY = "Give the folder of a whole Wan pipeline, as diffusers saves it"

Parts = dict[str, str]
"""Addresses of the networks, by the prefix that their tensors have in the artefact."""


@dataclass(frozen=True, kw_only=True)
class ImportWanConfig:
    """What `jobs/import_wan.py` takes.

    Attributes:
        run: Name and tracking.
        source_uri: Folder of the pipeline, local or ``s3://``.
        data: Latent set that the pipeline's autoencoder and text encoder made; it decides about
            shapes, normalisation and null prompt.
        sampling: Guidance with which the teacher is meant to be sampled and distilled.
        output_uri: Empty folder or ``s3://`` address for the teacher.
    """

    run: RunConfig
    source_uri: str
    data: DataConfig
    sampling: GuidanceConfig = field(default_factory=GuidanceConfig)
    output_uri: str


@dataclass(frozen=True)
class ImportWanPlan:
    """A validated import.

    Attributes:
        config: What was asked for.
        parts: Of the pipeline.
        architecture: Of the teacher.
        manifest: Of the latent set.
        null: Its null prompt.
        output_uri: Absolute.
    """

    config: ImportWanConfig
    parts: Parts
    architecture: WanConfig
    manifest: LatentManifest
    null: NullText
    output_uri: str

    def describe(self) -> str:
        """What would be imported."""
        parts, shape = " and ".join(self.parts.values()), self.architecture.latent_shape
        return f"import {parts} for latents {shape} to {self.output_uri}"

    def execute(self) -> JobResult:
        """Write the artefact."""
        print(self.describe(), flush=True)
        config, run = self.config, self.config.run
        store = connect_store(run.tracking, embedded_root(run.storage_uri))
        made_from = {"manifest_sha256": self.manifest.sha256, "null_text_sha256": self.null.sha256}
        with (
            open_run(store, run.name, job=JOB, config=config, tags=made_from) as tracked,
            tempfile.TemporaryDirectory() as folder,
        ):
            sha256 = write_artifact(Path(folder), self._weights(), self._artifact())
            storage.upload_folder(Path(folder), self.output_uri)
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
        config, manifest = self.config, self.manifest
        return ArtifactConfig(
            role="teacher",
            architecture=self.architecture,
            objective="flow_matching",
            conditioning="plain",
            guidance_scale=config.sampling.scale,
            guidance_low=config.sampling.low,
            guidance_high=config.sampling.high,
            recommended_nfe=(50,),
            normalisation_mean=manifest.mean,
            normalisation_std=manifest.std,
            autoencoder_id=manifest.autoencoder_id,
            autoencoder_sha256=manifest.autoencoder_sha256,
            text_encoder_id=self.null.encoder_id,
            text_encoder_sha256=self.null.encoder_sha256,
            latent_manifest_sha256=manifest.sha256,
            images_seen=0,
            ema_sigma_rel=0.0,
            config_hash=config_hash(config),
        )


def prepare(config: ImportWanConfig) -> ImportWanPlan:
    """Check everything but the numbers in the weights.

    Raises:
        InvalidInputError: no pipeline there, not one of Wan from text alone, missing or unexpected
            tensors (all of them listed), a latent set that does not belong to it or has no null
            prompt, or an output that is not empty.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    source_uri = storage.absolute(config.source_uri, "source_uri")
    data_uri = storage.absolute(config.data.uri, "data.uri")
    output_uri = storage.absolute(config.output_uri, "output_uri")
    storage.check_reachable(output_uri, "output_uri")
    empty = not storage.list_files(output_uri)
    require(empty, "output_uri", config.output_uri, "it is not empty", "Choose another place")
    manifest = LatentManifest.load(data_uri)
    texts = bool(manifest.text_shape)
    labels = "its rows have labels, and a Wan reads texts"
    require(texts, "data.uri", config.data.uri, labels, "Use a latent set with texts")
    null = NullText.load(data_uri, manifest)
    parts, boundary = _parts(source_uri)
    _check_normalisation(source_uri, manifest)
    found = [_architecture(uri, manifest, boundary) for uri in parts.values()]
    same = all(one == found[0] for one in found)
    require(same, "source_uri", source_uri, "its two networks are not of one size", _REMEDY)
    _check_names(parts, found[0], source_uri)
    return ImportWanPlan(config, parts, found[0], manifest, null, output_uri)


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


def _architecture(uri: str, manifest: LatentManifest, boundary: float | None) -> WanConfig:
    file = storage.join(uri, _CONFIG)
    channels, height, width = manifest.latent_shape
    tokens, features = manifest.text_shape
    try:
        architecture = WanConfig.from_diffusers(
            _json(file), height=height, width=width, text_tokens=tokens, boundary=boundary
        )
    except InvalidInputError as error:
        raise InvalidInputError("source_uri", file, str(error), error.remedy) from error
    for what, ours, theirs in (
        ("channels of a latent", architecture.in_channels, channels),
        ("features of a text", architecture.text_dim, features),
    ):
        problem = f"the network has {ours} {what}, data.uri {theirs}"
        require(ours == theirs, "source_uri", file, problem, "Use a latent set made with it")
    return architecture


def _check_normalisation(source_uri: str, manifest: LatentManifest) -> None:
    """Another normalisation than the network's is the costliest silent error there is."""
    file = storage.join(source_uri, "vae", _CONFIG)
    if not storage.exists(file):
        return
    values = _json(file)
    for name in ("mean", "std"):
        ours = getattr(manifest, name)
        theirs = values.get(f"latents_{name}") or ours
        require(
            len(ours) == len(theirs) and all(map(math.isclose, ours, theirs)),
            "data.uri",
            ours,
            f"the {name} of the set; the network was trained under {theirs}",
            "Import the latents with the pipeline's, and statistics=given",
        )


def _check_names(parts: Parts, architecture: WanConfig, source_uri: str) -> None:
    with torch.device("meta"):
        tensors = build_network(architecture).state_dict()
    # The null prompt is the latent set's.
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
        values: dict[str, Any] = json.loads(storage.read_bytes(uri))
    except (FileNotFoundError, ValueError) as error:
        problem = f"not readable ({type(error).__name__})"
        raise InvalidInputError("source_uri", uri, problem, _REMEDY) from error
    return values
