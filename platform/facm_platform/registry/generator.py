"""From classes or prompts, and seeds, to pictures: one way, for sheets, MLflow and serving."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from facm_core.errors import require
from facm_core.models import Condition
from facm_core.pixels import quantise
from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_core.text_encoders import EmbeddedText
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.tables import TEXT_EMBEDDING, TEXT_MASK
from facm_platform.latents.text_encoder import open_text_encoder
from facm_platform.registry.artifact import (
    Artifact,
    ArtifactConfig,
    ArtifactInfo,
    load_artifact,
)

LatentSampler = Callable[[Sequence[int], Condition, int], Tensor]
"""(seeds, labels or embedded prompts, steps) -> latents (B, …), denormalised by the artefact."""

Subject: TypeAlias = int | str
"""What to draw: a class, or for a model of texts a prompt."""

# Prompts whose embeddings are kept; of Wan's, 8 MiB each.
_KEPT_PROMPTS = 64


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
    """A model with its autoencoder: a pure function of classes or prompts, seeds and steps.

    It computes in float64. A batch of another size takes other paths through the matrix products
    and rounds differently; in float32 that moves a pixel to another grey level now and then, in
    float64 it would have to lie within 1e-13 of the border between two of them. So a sample is the
    same whatever it was batched with, which a batch of fixed shape alone would not give: products
    and functions of vectors round by the place in the batch, too. Prompts are embedded in float32,
    each alone.

    Args:
        artifact: The model.
        device: ``cpu`` or ``cuda``.

    Raises:
        InvalidInputError: its autoencoder or text encoder is not where the artefact says, or is
            another one; or it reads texts, and its text encoder is not known.
    """

    def __init__(self, artifact: Artifact, device: str = "cpu") -> None:
        self.config: ArtifactConfig = artifact.config
        self.sha256 = artifact.sha256
        config = artifact.config
        autoencoder = open_autoencoder(config.autoencoder_id, config.autoencoder_sha256)
        self._autoencoder = autoencoder.to(device, torch.float64)
        if self.takes_prompts:
            check_text_encoder("artifact", artifact)
            (tokens, _), sha256 = config.architecture.text_shape, config.text_encoder_sha256
            encoder = open_text_encoder(config.text_encoder_id, tokens, sha256, "text_encoder_id")
            self._text_encoder = encoder.to(device, torch.float32)
            self._embedded: OrderedDict[str, EmbeddedText] = OrderedDict()
        self._sample = latent_sampler(artifact, torch.device(device), torch.float64)
        nothing = self._draw([""] if self.takes_prompts else [0], [0], 1)
        self.image_shape: tuple[int, ...] = tuple(nothing.shape[1:])

    @classmethod
    def load(cls, uri: str, device: str = "cpu", field: str = "artifact") -> Generator:
        """The generator of the artefact at `uri`.

        Raises:
            InvalidInputError: as `load_artifact` and the constructor.
        """
        return cls(load_artifact(uri, field), device)

    @property
    def takes_prompts(self) -> bool:
        """Whether it draws prompts, and not classes."""
        return self.num_classes == 0

    @property
    def num_classes(self) -> int:
        """Classes are those below; 0 for a model of texts."""
        return self.config.architecture.num_classes

    @property
    def default_steps(self) -> int:
        """The fewest steps that the model is meant for."""
        return min(self.config.recommended_nfe)

    def check(self, subject: Subject, field: str = "label") -> None:
        """Raise `InvalidInputError` unless the model can draw it.

        A prompt of more tokens than the text encoder reads is none that it could not: the rest is
        cut off, as in Wan's pipeline.

        Args:
            subject: Class or prompt.
            field: Name of a class in messages.
        """
        known = f"Use 0 to {self.num_classes - 1}"
        if isinstance(subject, str):
            no_text = "this model draws classes and knows no text"
            require(
                self.takes_prompts, "prompt", subject, no_text, f"Give {field}: {known.lower()}"
            )
            require(bool(subject.strip()), "prompt", subject, "empty", "Say what to draw")
            return
        no_classes = "this model draws prompts and knows no classes"
        require(not self.takes_prompts, field, subject, no_classes, "Give prompt instead")
        there = f"the model has {self.num_classes} classes"
        require(0 <= subject < self.num_classes, field, subject, there, known)

    def generate(
        self, subjects: Sequence[int] | Sequence[str], seeds: Sequence[int], steps: int
    ) -> Tensor:
        """Draw images.

        Args:
            subjects: Class or prompt of each.
            seeds: Seed of each, from 0.
            steps: Evaluations of the network for each.

        Returns:
            uint8 (B, C, H, W), on the CPU.

        Raises:
            InvalidInputError: what the model cannot draw, a negative seed or no steps.
        """
        alike = len(subjects) == len(seeds)
        require(alike, "seeds", len(seeds), "not one an image", "Give as many")
        for subject in subjects:
            self.check(subject)
        require(min(seeds, default=0) >= 0, "seeds", min(seeds, default=0), "negative", "Use 0 on")
        return self._draw(subjects, seeds, steps)

    def _draw(self, subjects: Sequence[Subject], seeds: Sequence[int], steps: int) -> Tensor:
        with torch.inference_mode():
            latents = self._sample(seeds, self._condition(subjects), steps)
            return quantise(self._autoencoder.decode(latents)).cpu()

    def _condition(self, subjects: Sequence[Subject]) -> Condition:
        if not self.takes_prompts:
            return torch.tensor(subjects, dtype=torch.int64)
        embedded = [self._embed(str(subject)) for subject in subjects]
        return {
            TEXT_EMBEDDING: torch.cat([one.text_embedding for one in embedded]),
            TEXT_MASK: torch.cat([one.text_mask for one in embedded]),
        }

    def _embed(self, prompt: str) -> EmbeddedText:
        """Alone: an embedding rounds by what it is batched with."""
        found = self._embedded.pop(prompt, None) or self._text_encoder.encode([prompt])
        self._embedded[prompt] = found
        if len(self._embedded) > _KEPT_PROMPTS:
            self._embedded.popitem(last=False)
        return found


def check_text_encoder(field: str, artifact: ArtifactInfo) -> None:
    """Raise `InvalidInputError` unless a model of texts says by what prompts are embedded."""
    known = bool(artifact.config.text_encoder_id)
    unknown = "it reads texts, and does not say by which text encoder: it cannot be asked by prompt"
    remedy = "Train it on a latent set whose null prompt names its text encoder"
    require(known, field, artifact.uri, unknown, remedy)
