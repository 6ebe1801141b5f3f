"""Sampling and feature statistics on Ray actors; only sums and a few images travel.

Work is cut into blocks that do not depend on the number of actors, and merged in their order, so
that one actor or many give the same bits. Inside a block every sample has its own seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util import ActorPool
from torch import Tensor

from facm_core.metrics import FrechetStatistics
from facm_platform.evaluation.features import load_features
from facm_platform.evaluation.protocol import Protocol, dequantise, quantise
from facm_platform.evaluation.real import real_images
from facm_platform.latents import LatentManifest
from facm_platform.latents.autoencoder import autoencoder_of
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import LatentSampler, latent_sampler

BLOCK_SAMPLES = 500
# A block is a pure function, so a lost actor is replaced and its block computed again.
_RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every actor needs to know, as plain data.

    Attributes:
        protocol: Meaning of the numbers.
        data_uri: The reference set, absolute.
        manifest: Its manifest.
        features_uri: Feature extractor, absolute.
        shown_classes: Images of the classes below this one are kept,
        shown_samples: this many of each.
        batch_size: Samples at once: memory and speed only.
        device: ``cpu`` or ``cuda``.
    """

    protocol: Protocol
    data_uri: str
    manifest: LatentManifest
    features_uri: str
    shown_classes: int
    shown_samples: int
    batch_size: int
    device: str

    def is_shown(self, index: int) -> bool:
        """Whether sample `index` is one of the kept images."""
        sample, label = divmod(index, self.manifest.num_classes)
        return label < self.shown_classes and sample < self.shown_samples


@dataclass
class Measured:
    """What was seen of one set of images.

    Attributes:
        statistics: Of the features.
        agreeing: Images whose class, as the extractor sees it, is their label.
        shown: Kept images, uint8 (C, H, W), by (label, number among that label).
    """

    statistics: FrechetStatistics
    agreeing: int
    shown: dict[tuple[int, int], Tensor]

    def merge(self, other: Measured) -> Measured:
        """Add another part, in place."""
        self.statistics.merge(other.statistics)
        self.agreeing += other.agreeing
        self.shown |= other.shown
        return self

    @property
    def agreement(self) -> float:
        """Share of images seen as their label."""
        return self.agreeing / self.statistics.count


class Evaluator:
    """One process's share: models stay loaded between blocks. Runs in an actor, or by itself."""

    def __init__(self, workload: Workload) -> None:
        self._load = workload
        self._device = torch.device(workload.device)
        if workload.device == "cpu":
            # An actor has one CPU, and its neighbours the others.
            torch.set_num_threads(1)
        self._dtype = workload.protocol.dtype
        self._extractor = load_features(workload.features_uri).to(self._device, self._dtype)
        self._autoencoder = autoencoder_of(workload.manifest)
        self._samplers: dict[str, LatentSampler] = {}

    def reference(self) -> Measured:
        """The reference set, every row."""
        seen: dict[int, int] = {}
        total = self._nothing()
        rows = self._load.batch_size
        for images, labels in real_images(self._load.data_uri, self._load.manifest, rows):
            shown = {}
            for image, label in zip(images, labels.tolist(), strict=True):
                number = seen.get(label, 0)
                seen[label] = number + 1
                if label < self._load.shown_classes and number < self._load.shown_samples:
                    shown[label, number] = image
            total.merge(self._measure(images, labels, shown))
        return total

    def block(self, artifact_uri: str, steps: int, start: int, stop: int) -> Measured:
        """The samples [start, stop) of the model at `artifact_uri` in `steps` steps."""
        total = self._nothing()
        for first in range(start, stop, self._load.batch_size):
            last = min(first + self._load.batch_size, stop)
            labels = self._load.protocol.sample_labels(first, last, self._load.manifest.num_classes)
            seeds = self._load.protocol.sample_seeds(first, last)
            latents = self._sampler(artifact_uri)(seeds, labels, steps)
            images = quantise(self._autoencoder.decode(latents)).cpu()
            classes = self._load.manifest.num_classes
            shown = {
                (index % classes, index // classes): image.clone()
                for index, image in zip(range(first, last), images, strict=True)
                if self._load.is_shown(index)
            }
            total.merge(self._measure(images, labels, shown))
        return total

    def _sampler(self, uri: str) -> LatentSampler:
        if uri not in self._samplers:
            artifact = load_artifact(uri, "artifact")
            self._samplers[uri] = latent_sampler(artifact, self._device, self._dtype)
        return self._samplers[uri]

    def _measure(
        self, images: Tensor, labels: Tensor, shown: dict[tuple[int, int], Tensor]
    ) -> Measured:
        features, logits = self._extractor(dequantise(images, self._dtype))
        seen = logits.argmax(dim=1).cpu()
        measured = self._nothing()
        measured.statistics.update(features)
        measured.agreeing = int((seen == labels).sum())
        measured.shown = shown
        return measured

    def _nothing(self) -> Measured:
        return Measured(FrechetStatistics(self._extractor.info.dimension), 0, {})


class Engine:
    """Actors of the connected cluster; use as a context manager, which ends them.

    Args:
        workload: What they need to know.
        actors: How many, each with one CPU, and one GPU where the device is ``cuda``.
    """

    def __init__(self, workload: Workload, actors: int) -> None:
        self._load = workload
        remote = ray.remote(
            num_cpus=1,
            num_gpus=int(workload.device == "cuda"),
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )(Evaluator)
        self._actors: list[Any] = [remote.remote(workload) for _ in range(actors)]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def reference(self) -> Measured:
        """The reference set, on one actor."""
        measured: Measured = ray.get(self._actors[0].reference.remote())
        return measured

    def samples(self, artifact_uri: str, steps: int) -> Measured:
        """All samples of the model at `artifact_uri` in `steps` steps."""
        blocks = self._blocks(artifact_uri, steps)
        total = next(blocks)
        for block in blocks:
            total.merge(block)
        return total

    def _blocks(self, artifact_uri: str, steps: int) -> Iterator[Measured]:
        """Results in the order of the samples, whichever actor is faster."""
        samples = self._load.protocol.samples
        ranges = [
            (start, min(start + BLOCK_SAMPLES, samples))
            for start in range(0, samples, BLOCK_SAMPLES)
        ]

        def submit(actor: Any, bounds: tuple[int, int]) -> Any:
            return actor.block.remote(artifact_uri, steps, *bounds)

        yield from ActorPool(self._actors).map(submit, ranges)
