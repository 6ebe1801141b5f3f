"""A model of Wan -> a folder that diffusers' own `WanPipeline` loads."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facm_core.autoencoders import WanAutoencoder
from facm_core.errors import InvalidInputError, require
from facm_core.models import WanConfig
from facm_core.text_encoders import MODEL, TOKENIZER, WordTextEncoder
from facm_platform import storage
from facm_platform.config import JobResult
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.text_encoder import find_text_encoder
from facm_platform.registry.artifact import CARD, ArtifactInfo, load_artifact, read_artifact
from facm_platform.registry.generator import check_text_encoder

JOB = "to_diffusers"
_INDEX, _VAE = "model_index.json", "vae"
_REMEDY = "Give the folder of the Wan pipeline that the model was made from"
# Of a video, to a latent frame.
_FRAMES = 4
_SIDES = 16


@dataclass(frozen=True, kw_only=True)
class ToDiffusersConfig:
    """What `jobs/to_diffusers.py` takes.

    Attributes:
        artifact_uri: Model artefact, a student or a teacher of Wan's architecture.
        pipeline_uri: Folder of the pipeline whose autoencoder, text encoder and tokenizer it needs,
            local or ``s3://``; None: where the artefact says that its text encoder lies.
        output_uri: Empty folder or ``s3://`` address for the new pipeline.
    """

    artifact_uri: str
    pipeline_uri: str | None = None
    output_uri: str


@dataclass(frozen=True)
class ToDiffusersPlan:
    """A validated conversion.

    Attributes:
        artifact: The model.
        architecture: Its own.
        pipeline_uri: Absolute.
        parts: What is copied of that pipeline, by folder: library and class.
        stride: Pixels to a latent's, of the pipeline's autoencoder.
        output_uri: Absolute.
    """

    artifact: ArtifactInfo
    architecture: WanConfig
    pipeline_uri: str
    parts: dict[str, tuple[str, str]]
    stride: int
    output_uri: str

    def describe(self) -> str:
        """What would be written."""
        config = self.artifact.config
        return (
            f"{config.role} {self.artifact.uri} with {', '.join(self.parts)} of "
            f"{self.pipeline_uri} to {self.output_uri}"
        )

    def execute(self) -> JobResult:
        """Write the folder; ``model_index.json``, which completes it, comes last."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        from facm_core.diffusers_pipeline import FewStepScheduler, save_pipeline

        print(self.describe(), flush=True)
        artifact = load_artifact(self.artifact.uri, "artifact_uri")
        # Of noise levels, where ours is of time: one is the other's inverse.
        shift = 1 / artifact.config.shift
        scheduler: Any = FewStepScheduler(shift=shift)
        if artifact.config.role == "teacher":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)  # type: ignore[no-untyped-call]
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent)
            save_pipeline(folder, artifact.model, scheduler)
            index = json.loads((folder / _INDEX).read_text()) | self.parts
            (folder / _INDEX).unlink()
            (folder / CARD).write_text(_readme(artifact, self.architecture, self.stride))
            storage.upload_folder(folder, self.output_uri)
        for part in self.parts:
            with storage.node_copy(storage.join(self.pipeline_uri, part)) as files:
                storage.upload_folder(files, storage.join(self.output_uri, part))
        content = json.dumps(index, indent=2) + "\n"
        storage.write_bytes(storage.join(self.output_uri, _INDEX), content.encode())
        return JobResult(run_id=None, run_name=JOB, artifact_uri=self.output_uri)


def prepare(config: ToDiffusersConfig) -> ToDiffusersPlan:
    """Check everything; writes nothing.

    Raises:
        InvalidInputError: no artefact of a Wan, or one whose text encoder is not known; no pipeline
            with the autoencoder, the text encoder and the normalisation of the model; or an output
            that is not empty.
    """
    output_uri = storage.empty_folder(config.output_uri, "output_uri")
    artifact = read_artifact(config.artifact_uri, "artifact_uri")
    architecture = artifact.config.architecture
    if not isinstance(architecture, WanConfig):
        problem = f"it draws {architecture.num_classes} classes, and is no Wan"
        raise InvalidInputError("artifact_uri", artifact.uri, problem, "Give a model of Wan")
    check_text_encoder("artifact_uri", artifact)
    given = config.pipeline_uri or artifact.config.text_encoder_id
    problem = "this text encoder is no part of a pipeline"
    require(given != WordTextEncoder.id, "pipeline_uri", given, problem, _REMEDY)
    pipeline_uri = storage.absolute(given, "pipeline_uri")
    tokens, sha256 = architecture.text_tokens, artifact.config.text_encoder_sha256
    find_text_encoder(pipeline_uri, tokens, sha256, "pipeline_uri")
    stride = _stride(artifact, storage.join(pipeline_uri, _VAE))
    sides = tuple(side * stride for side in (architecture.height, architecture.width))
    problem = (
        f"its images have sides of {sides} pixels, and WanPipeline draws multiples of {_SIDES}"
    )
    fits = all(side % _SIDES == 0 for side in sides)
    require(fits, "artifact_uri", artifact.uri, problem, "Give a model of such images")
    parts = {
        _VAE: ("diffusers", "AutoencoderKLWan"),
        MODEL: ("transformers", "UMT5EncoderModel"),
        TOKENIZER: ("transformers", _tokenizer(storage.join(pipeline_uri, _INDEX))),
    }
    return ToDiffusersPlan(artifact, architecture, pipeline_uri, parts, stride, output_uri)


def _stride(artifact: ArtifactInfo, uri: str) -> int:
    """Of the autoencoder at `uri`, which must be the artefact's, under the same normalisation."""
    config = artifact.config
    autoencoder = open_autoencoder(uri, config.autoencoder_sha256, "pipeline_uri")
    if not isinstance(autoencoder, WanAutoencoder):
        raise InvalidInputError("pipeline_uri", uri, "it is no autoencoder of Wan", _REMEDY)
    # WanPipeline takes it from there.
    theirs, ours = autoencoder.normalisation, (config.normalisation_mean, config.normalisation_std)
    problem = f"it normalises latents by {theirs}, the model by {ours}"
    remedy = "Distill on latents in the pipeline's own normalisation, as jobs/synthesise.py draws"
    require(theirs == ours, "pipeline_uri", uri, problem, remedy)
    return autoencoder.stride


def _tokenizer(uri: str) -> str:
    """Class of the tokenizer, as the pipeline's index names it."""
    try:
        library, name = json.loads(storage.read_bytes(uri))[TOKENIZER]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        problem = f"it names no {TOKENIZER} ({type(error).__name__})"
        raise InvalidInputError("pipeline_uri", uri, problem, _REMEDY) from error
    problem = f"its {TOKENIZER} is {library}.{name}, not one of transformers"
    require(library == "transformers", "pipeline_uri", uri, problem, _REMEDY)
    return str(name)


def _readme(artifact: ArtifactInfo, architecture: WanConfig, stride: int) -> str:
    """How to run it."""
    config = artifact.config
    student = config.role == "student"
    text = _STUDENT if student else _TEACHER
    guidance = config.guidance
    if not student and (guidance.low, guidance.high) != (0, 1):
        text += _INTERVAL
    return (_HEAD + text + _FOOT).format(
        role=config.role,
        scheduler="import facm_core.diffusers_pipeline  # its scheduler\n\n" if student else "",
        height=architecture.height * stride,
        width=architecture.width * stride,
        frames=1 + _FRAMES * (architecture.frames - 1),
        steps=min(config.recommended_nfe),
        all_steps=", ".join(map(str, config.recommended_nfe)),
        scale=1.0 if student else guidance.scale,
        low=guidance.low,
        high=guidance.high,
        tokens=architecture.text_tokens,
        shape=config.latent_shape,
        video="[:, :, None]" if architecture.frames == 1 else "",
        sha256=artifact.sha256,
    )


_HEAD = """\
# A {role} of Wan

```python
import torch
from diffusers import WanPipeline

{scheduler}pipeline = WanPipeline.from_pretrained("FOLDER", torch_dtype=torch.bfloat16).to("cuda")
pipeline(
    "a red barn in the snow",
    height={height},
    width={width},
    num_frames={frames},
    num_inference_steps={steps},
    guidance_scale={scale},
    max_sequence_length={tokens},
)
```

"""

_STUDENT = """\
Guidance is inside it already: `guidance_scale` stays 1. It is meant for {all_steps} steps.

Its scheduler is `facm_core.diffusers_pipeline.FewStepScheduler`. Where that module is not imported
first, because `facm_core` is not there, diffusers cannot load this folder.

The picture that the platform draws for a seed, but for rounding:

```python
from facm_core.samplers import sample_noise

pipeline.scheduler.seeds = [7]
pipeline(..., latents=sample_noise({shape}, [7]){video})
```
"""

_TEACHER = """\
Its scheduler is diffusers' own `FlowMatchEulerDiscreteScheduler`, with the teacher's shift. Its
noise levels are not quite the platform's, which are even before the shift.
"""

_INTERVAL = """
The platform guides it at times from {low:g} to {high:g} only, t = 0 being noise; `WanPipeline`
guides every step.
"""

_FOOT = """
Made of the artefact whose weights have the sha256 `{sha256}`.
"""
