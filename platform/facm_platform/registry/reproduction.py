"""A few samples that a model must make again, bit for bit, before it is promoted."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from facm_core.models import Condition
from facm_core.samplers import sample_noise
from facm_platform.latents.tables import TEXT_EMBEDDING, TEXT_MASK
from facm_platform.registry.artifact import Artifact, ArtifactConfig, load_artifact
from facm_platform.registry.generator import latent_sampler

SAMPLES = "samples.safetensors"
"""Beside the weights: latents of a student, in its first recommended step count."""

_COUNT = 16
# A stream of noise beyond those of the steps.
_TEXTS = 2**32


def write_samples(folder: Path, artifact: Artifact) -> Path:
    """Store samples of a student in `folder`, as they should lie beside its weights."""
    latents = _latents(artifact)
    safetensors.torch.save_file({"latents": latents}, folder / SAMPLES)
    return folder / SAMPLES


def reproduces(folder: Path) -> str | None:
    """What speaks against the student in `folder`: None, if it makes the stored samples again.

    Raises:
        InvalidInputError: it does not load.
    """
    artifact = load_artifact(str(folder), "source")
    try:
        stored = safetensors.torch.load_file(folder / SAMPLES)["latents"]
    except (FileNotFoundError, KeyError):
        return f"there are no samples ({SAMPLES}) to make again: evaluate it again"
    except SafetensorError as error:
        return f"{SAMPLES} is damaged: {error}"
    found = _latents(artifact)
    if found.shape != stored.shape:
        return f"its samples are {tuple(found.shape)}, the stored ones {tuple(stored.shape)}"
    differing = [i for i in range(len(found)) if not torch.equal(found[i], stored[i])]
    if differing:
        return f"it does not make its stored samples {differing} again"
    return None


@torch.no_grad()
def _latents(artifact: Artifact) -> Tensor:
    """(16, C, H, W), computed in float64 on the CPU, rounded to float32.

    The last digits of float64 depend on the processor; those of float32, then, do not.
    """
    config, seeds = artifact.config, list(range(_COUNT))
    sample = latent_sampler(artifact, torch.device("cpu"), torch.float64)
    try:
        return sample(seeds, _condition(config, seeds), config.recommended_nfe[0]).float()
    finally:
        artifact.model.float()


def _condition(config: ArtifactConfig, seeds: list[int]) -> Condition:
    """Every class in turn; of a model of texts, noise for texts, of all lengths.

    Embedded prompts would do no better, and differ by their last digits from one processor to
    another.
    """
    architecture = config.architecture
    if architecture.num_classes:
        return torch.arange(_COUNT) % architecture.num_classes
    tokens, _ = architecture.text_shape
    lengths = 1 + torch.arange(_COUNT) * tokens // _COUNT
    return {
        TEXT_EMBEDDING: sample_noise(architecture.text_shape, seeds, stream=_TEXTS),
        TEXT_MASK: torch.arange(tokens) < lengths[:, None],
    }
