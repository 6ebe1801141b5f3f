"""From class labels and seeds to pictures: one way, for evaluation, MLflow and serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from facm_core.errors import require
from facm_core.models import Condition
from facm_core.pixels import quantise
from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.registry.artifact import Artifact, ArtifactConfig, load_artifact

LatentSampler = Callable[[Sequence[int], Condition, int], Tensor]
"""(seeds, labels or prompts, steps) -> latents (B, …), denormalised as the artefact says."""


def latent_sampler(artifact: Artifact, device: torch.device, dtype: torch.dtype) -> LatentSampler:
    """How a model is asked: a student in consistency steps, a teacher by Euler's method."""
    model, config = artifact.model.to(device, dtype), artifact.config
    mean, std = torch.tensor(
        [config.normalisation_mean, config.normalisation_std], dtype=dtype, device=device
    ).view(2, -1, *[1] * (len(config.latent_shape) - 1))

    def sample(seeds: Sequence[int], condition: Condition, steps: int) -> Tensor:
        noise = sample_noise(config.latent_shape, seeds).to(device, dtype)
        if isinstance(condition, Tensor):
            condition = condition.to(device)
        else:
            condition = {name: value.to(device) for name, value in condition.items()}
        if config.role == "student":
            x = sample_consistency(
                model, noise, condition, steps=steps, seeds=seeds, shift=config.shift
            )
        else:
            guidance = config.guidance
            x = sample_euler(
                model, noise, condition, steps=steps, guidance=guidance, shift=config.shift
            )
        return x * std + mean

    return sample


class Generator:
    """A model with its autoencoder: a pure function of labels, seeds and steps.

    It computes in float64. A batch of another size takes other paths through the matrix products
    and rounds differently; in float32 that moves a pixel to another grey level now and then, in
    float64 it would have to lie within 1e-13 of the border between two of them. So a sample is the
    same whatever it was batched with, which a batch of fixed shape alone would not give: products
    and functions of vectors round by the place in the batch, too.

    Args:
        artifact: The model.
        device: ``cpu`` or ``cuda``.

    Raises:
        InvalidInputError: its autoencoder is not where the artefact says, or is another one; or
            the model reads texts.
    """

    def __init__(self, artifact: Artifact, device: str = "cpu") -> None:
        texts = artifact.config.architecture.num_classes == 0
        by_label = "it reads texts, and is asked by label"
        require(not texts, "artifact", artifact.uri, by_label, "Use a model with classes")
        self.config: ArtifactConfig = artifact.config
        self.sha256 = artifact.sha256
        config = artifact.config
        autoencoder = open_autoencoder(config.autoencoder_id, config.autoencoder_sha256)
        self._autoencoder = autoencoder.to(device, torch.float64)
        self._sample = latent_sampler(artifact, torch.device(device), torch.float64)
        self.image_shape: tuple[int, ...] = tuple(self.generate([0], [0], 1).shape[1:])

    @classmethod
    def load(cls, uri: str, device: str = "cpu", field: str = "artifact") -> Generator:
        """The generator of the artefact at `uri`.

        Raises:
            InvalidInputError: as `load_artifact` and the constructor.
        """
        return cls(load_artifact(uri, field), device)

    @property
    def num_classes(self) -> int:
        """Labels are those below."""
        return self.config.architecture.num_classes

    @property
    def default_steps(self) -> int:
        """The fewest steps that the model is meant for."""
        return min(self.config.recommended_nfe)

    def check_label(self, label: int, field: str = "label") -> None:
        """Raise `InvalidInputError` unless the model knows the class."""
        known = self.num_classes
        remedy = f"Use 0 to {known - 1}"
        require(0 <= label < known, field, label, f"the model has {known} classes", remedy)

    def generate(self, labels: Sequence[int], seeds: Sequence[int], steps: int) -> Tensor:
        """Draw images.

        Args:
            labels: Class of each.
            seeds: Seed of each, from 0.
            steps: Evaluations of the network for each.

        Returns:
            uint8 (B, C, H, W), on the CPU.

        Raises:
            InvalidInputError: an unknown class, a negative seed or no steps.
        """
        require(len(labels) == len(seeds), "seeds", len(seeds), "not one a label", "Give as many")
        for label in labels:
            self.check_label(label)
        require(min(seeds, default=0) >= 0, "seeds", min(seeds, default=0), "negative", "Use 0 on")
        with torch.inference_mode():
            latents = self._sample(seeds, torch.tensor(labels, dtype=torch.int64), steps)
            return quantise(self._autoencoder.decode(latents)).cpu()
