"""The model artefact: a folder with ``model.safetensors``, ``config.json`` and ``README.md``.

It holds everything that sampling needs, with the hashes of what it was made from. Nothing in it is
pickled, and no loader here executes what it reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.guidance import GuidanceConfig
from facm_core.models import (
    Architecture,
    LightningDiTConfig,
    Network,
    WanConfig,
    build_network,
)
from facm_platform.registry.weights import WeightsWriter
from facm_platform.storage import absolute, file_sha256, node_copy, output_file, upload_folder

SCHEMA_VERSION = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
OBJECTIVES = {
    "flow_matching": "flow matching",
    "facm": "FACM",
    "mean_flow": "MeanFlow",
    "scm": "sCM",
}
"""Name -> how it is written in texts."""
_KINDS: dict[str, type[Architecture]] = {"lightning_dit": LightningDiTConfig, "wan": WanConfig}
"""Of architectures, as ``config.json`` names them."""


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """What ``config.json`` tells besides the hash of the weights.

    Attributes:
        schema_version: Of this format.
        role: ``teacher`` or ``student``.
        architecture: The network.
        objective: What it was trained with, one of `OBJECTIVES`.
        conditioning: How it is told what to predict: ``expanded`` (t or 2 − t), ``auxiliary``
            (t and r) or ``plain`` (t alone).
        guidance_scale: Guidance scale baked into a student, recommended for a teacher.
        guidance_low: Start of the guidance interval.
        guidance_high: End of the guidance interval.
        recommended_nfe: Step counts it is meant for.
        shift: Time shift it is meant to be sampled with, see `facm_core.samplers`.
        normalisation_mean: Per channel, of the latents; a sample x is x · std + mean.
        normalisation_std: Per channel.
        autoencoder_id: What decodes a latent.
        autoencoder_sha256: Hash of its weights.
        text_encoder_id: Address of what embeds its prompts; empty for a model with classes, and
            where it is not known.
        text_encoder_sha256: Hash of its files.
        latent_manifest_sha256: Hash of the latent set it was trained on; None where it is not
            known, of a model that was imported.
        teacher_sha256: Hash of the teacher's weights; None for a model trained from scratch.
        images_seen: Length of its training.
        ema_sigma_rel: Width of the power-function average that these weights are.
        config_hash: Of the whole training configuration.
    """

    schema_version: int = SCHEMA_VERSION
    role: str
    architecture: Architecture
    objective: str
    conditioning: str
    guidance_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    recommended_nfe: tuple[int, ...]
    shift: float = 1.0
    normalisation_mean: tuple[float, ...]
    normalisation_std: tuple[float, ...]
    autoencoder_id: str
    autoencoder_sha256: str
    text_encoder_id: str = ""
    text_encoder_sha256: str = ""
    latent_manifest_sha256: str | None
    teacher_sha256: str | None = None
    images_seen: int
    ema_sigma_rel: float
    config_hash: str

    def __post_init__(self) -> None:
        require(
            self.schema_version == SCHEMA_VERSION,
            "schema_version",
            self.schema_version,
            f"this code reads version {SCHEMA_VERSION}",
            "Use the code that wrote the artefact, or train again",
        )
        require_one_of("role", self.role, ("teacher", "student"))
        require_one_of("objective", self.objective, tuple(OBJECTIVES))
        require_one_of("conditioning", self.conditioning, ("expanded", "auxiliary", "plain"))
        require(
            self.architecture.second_time == (self.conditioning == "auxiliary"),
            "conditioning",
            self.conditioning,
            f"does not fit second_time = {self.architecture.second_time}",
            "Auxiliary conditioning goes with a second time input, the others without",
        )
        require(
            bool(self.recommended_nfe) and min(self.recommended_nfe) >= 1,
            "recommended_nfe",
            self.recommended_nfe,
            "not step counts",
            "Name at least one, each from 1",
        )
        require(self.shift > 0, "shift", self.shift, "not positive", "Use 1 for even steps")
        channels = self.architecture.in_channels
        for name in ("normalisation_mean", "normalisation_std"):
            value = getattr(self, name)
            require(
                len(value) == channels,
                name,
                value,
                f"expected {channels} values, one per latent channel",
                "Take it from the manifest of the latent set",
            )
        self.guidance  # noqa: B018  (validates its three fields)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ArtifactConfig:
        """The inverse of `to_json`.

        Raises:
            InvalidInputError, ValueError, KeyError, TypeError or AttributeError: it is none.
        """
        architecture = dict(values["architecture"])
        kind = architecture.pop("kind")
        known = f"This code knows {', '.join(_KINDS)}"
        require(kind in _KINDS, "kind", kind, "unknown architecture", known)
        built = _KINDS[kind](**_frozen(architecture))
        return cls(**_frozen(values) | {"architecture": built})

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON holds them."""
        values = dataclasses.asdict(self)
        kinds = {architecture: kind for kind, architecture in _KINDS.items()}
        kind = kinds[type(self.architecture)]
        return values | {"architecture": {"kind": kind, **values["architecture"]}}

    @property
    def guidance(self) -> GuidanceConfig:
        """The three guidance fields."""
        return GuidanceConfig(
            scale=self.guidance_scale, low=self.guidance_low, high=self.guidance_high
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W), of a video (C, T, H, W)."""
        return self.architecture.latent_shape


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """An artefact, but for its weights.

    Attributes:
        uri: Where it lies, absolute.
        config: What it is.
        sha256: Of its ``model.safetensors``.
    """

    uri: str
    config: ArtifactConfig
    sha256: str


@dataclass(frozen=True)
class Artifact(ArtifactInfo):
    """A loaded artefact.

    Attributes:
        model: In evaluation mode, float32, on the CPU, without gradients.
    """

    model: Network

    @property
    def info(self) -> ArtifactInfo:
        """All of it but the weights, to be sent about."""
        return ArtifactInfo(uri=self.uri, config=self.config, sha256=self.sha256)


def save_artifact(
    folder: Path, state_dict: Mapping[str, Tensor], config: ArtifactConfig, readme: str = ""
) -> str:
    """`write_artifact` of whole tensors, under the names of the model's own state dict."""
    return write_artifact(folder, state_dict.items(), config, readme)


def write_artifact(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: ArtifactConfig,
    readme: str = "",
) -> str:
    """Write an artefact into the local `folder`; ``config.json``, which completes it, comes last.

    Args:
        folder: Created when missing.
        tensors: Names of the model's own state dict and whole tensors, in any order. Each is
            written before the next one is asked for.
        config: What the model is.
        readme: Model card, Markdown.

    Returns:
        SHA-256 of the weights file.

    Raises:
        InvalidInputError: the tensors are not those of the architecture, or not finite.
    """
    expected = _expected(config.architecture)
    findings, found = [], set[str]()
    with output_file(str(folder / WEIGHTS)) as path:
        with path.open("wb") as file:
            writer = WeightsWriter(file, {name: tuple(t.shape) for name, t in expected.items()})
            for name, tensor in tensors:
                given = tensor.detach().to("cpu", torch.float32)
                finding = f"{name} twice" if name in found else _finding(name, given, expected)
                found.add(name)
                if finding:
                    findings.append(finding)
                else:
                    writer.write(name, given)
        _require_all(expected, found, findings, "state_dict", str(folder))
    sha256 = file_sha256(folder / WEIGHTS)
    (folder / CARD).write_text(readme)
    with output_file(str(folder / CONFIG)) as file_of_config:
        values = {**config.to_json(), "weights_sha256": sha256}
        file_of_config.write_text(json.dumps(values, indent=2) + "\n")
    return sha256


def upload_artifact(folder: Path, uri: str) -> None:
    """Copy an artefact to `uri`; ``config.json``, which completes it, comes last there, too."""
    upload_folder(folder, uri, last=CONFIG)


def load_artifact(uri: str, field: str = "teacher.uri") -> Artifact:
    """Read an artefact; every tensor of the model comes from the file, exactly.

    Args:
        uri: Its folder or ``s3://`` prefix.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: see `open_artifact`.
    """
    with open_artifact(uri, field) as (folder, info):
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    # Made without storage, so that loading draws nothing from the global random generator.
    with torch.device("meta"):
        model = build_network(info.config.architecture)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.eval().requires_grad_(False)
    return Artifact(uri=info.uri, model=model, config=info.config, sha256=info.sha256)


def read_artifact(uri: str, field: str = "teacher.uri") -> ArtifactInfo:
    """`load_artifact` without the model: as strict, with one tensor in memory at a time."""
    with open_artifact(uri, field) as (_, info):
        return info


@contextmanager
def open_artifact(
    uri: str, field: str = "teacher.uri", *, verify: bool = True
) -> Iterator[tuple[Path, ArtifactInfo]]:
    """An artefact's folder on this machine, and what it is.

    Args:
        uri: Its folder or ``s3://`` prefix.
        field: Configuration field that named it, for messages.
        verify: Whether every byte of the weights is looked at; another process of this machine may
            have done so.

    Raises:
        InvalidInputError: nothing there, not an artefact, a damaged file, or tensors that are not
            those of the architecture, or not finite (all of them listed).
    """
    address = absolute(uri, field)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(node_copy(address))
            config, sha256 = _read_config(folder / CONFIG, field, uri)
        except (FileNotFoundError, NotADirectoryError):
            raise _not_an_artifact(field, uri, "there is no such folder") from None
        if not (folder / WEIGHTS).is_file():
            raise _not_an_artifact(field, uri, f"{WEIGHTS} is missing")
        if verify:
            _verify(folder / WEIGHTS, sha256, config.architecture, field, uri)
        yield folder, ArtifactInfo(uri=address, config=config, sha256=sha256)


def _verify(file: Path, recorded: str, architecture: Architecture, field: str, uri: str) -> None:
    sha256 = file_sha256(file)
    require(
        sha256 == recorded,
        field,
        uri,
        f"{WEIGHTS} is damaged: its sha256 is {sha256}, {CONFIG} says {recorded}",
        "Restore the file from where it was copied, or train again",
    )
    expected = _expected(architecture)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            found = (_finding(name, opened.get_tensor(name), expected) for name in names)
            findings = [finding for finding in found if finding]
    except SafetensorError as error:
        raise _not_an_artifact(field, uri, f"{WEIGHTS} cannot be read ({error})") from error
    _require_all(expected, names, findings, field, uri)


def _expected(architecture: Architecture) -> dict[str, Tensor]:
    """The state dict, without storage."""
    with torch.device("meta"):
        return build_network(architecture).state_dict()


def _finding(name: str, got: Tensor, expected: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a tensor."""
    if name not in expected:
        return f"unexpected {name}"
    wanted = expected[name]
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        shapes = f"{tuple(got.shape)} {got.dtype}, not {tuple(wanted.shape)} {wanted.dtype}"
        return f"{name} is {shapes}"
    # No tensor of truth values, and it lets a value through that is not finite.
    if got.numel() and not all(bool(extreme.isfinite()) for extreme in got.aminmax()):
        return f"{name} has values that are not finite"
    return None


def _require_all(
    expected: Mapping[str, Tensor],
    found: Collection[str],
    findings: list[str],
    field: str,
    value: str,
) -> None:
    findings = [f"missing {name}" for name in expected if name not in found] + findings
    problem = "the tensors are not those of the architecture: " + "; ".join(findings)
    require(
        not findings, field, value, problem, "Use the weights and config of one and the same run"
    )


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _read_config(file: Path, field: str, uri: str) -> tuple[ArtifactConfig, str]:
    try:
        values = json.loads(file.read_text())
        sha256 = values.pop("weights_sha256")
        return ArtifactConfig.from_json(values), sha256
    except FileNotFoundError:
        raise _not_an_artifact(field, uri, f"{CONFIG} is missing") from None
    except InvalidInputError as error:
        raise InvalidInputError(field, uri, f"in its {CONFIG}: {error}", error.remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_an_artifact(field, uri, f"{CONFIG} cannot be read ({error})") from error


def _not_an_artifact(field: str, uri: str, problem: str) -> InvalidInputError:
    remedy = f"Give the folder of a trained model: {WEIGHTS} and {CONFIG} lie in it"
    return InvalidInputError(field, uri, f"not a model artefact: {problem}", remedy)
