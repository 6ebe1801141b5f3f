"""A few samples that a model must make again, bit for bit, before it is promoted."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from facm_platform.registry.artifact import Artifact, load_artifact
from facm_platform.registry.generator import latent_sampler

SAMPLES = "samples.safetensors"
"""Beside the weights: latents of a student, in its first recommended step count."""

_COUNT = 16


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
    labels = torch.arange(_COUNT) % config.architecture.num_classes
    sample = latent_sampler(artifact, torch.device("cpu"), torch.float64)
    try:
        return sample(seeds, labels, config.recommended_nfe[0]).float()
    finally:
        artifact.model.float()
