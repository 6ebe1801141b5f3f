"""Sampling and feature statistics on Ray actors; only sums, some features and images travel.

Work is cut into blocks that do not depend on the number of actors, and merged in their order, so
that one actor or many give the same bits. Inside a block every sample has its own seed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import ray
import safetensors.torch
import torch
from ray.util import ActorPool

from facm_core.pixels import quantise
from facm_platform import storage
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.evaluation.measured import Measured, Reference
from facm_platform.evaluation.protocol import Protocol, dtype_of
from facm_platform.evaluation.real import DecodedSet, RealImages
from facm_platform.evaluation.reference import ReferenceFile, make_reference, read_reference
from facm_platform.latents import LatentManifest
from facm_platform.latents.autoencoder import autoencoder_of
from facm_platform.progress import time_left
from facm_platform.registry import ArtifactInfo, load_artifact
from facm_platform.registry.generator import LatentSampler, latent_sampler

PARTS = 10
"""Of the samples, from whose spread the error of a score is told."""
BLOCK_SAMPLES = 500
# A block is a pure function, so a lost actor is replaced and its block computed again.
_RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class View:
    """How images are looked at, as plain data.

    Attributes:
        kind: Kind of the feature extractor.
        features_uri: Its address, absolute.
        keep: Features of so many images are kept.
        batch_size: Images at once: memory and speed only.
        gpu: Whether each process has one.
        shown_classes: Images of the classes below this one, or of so many rows with texts, are
            kept,
        shown_samples: this many of each.
    """

    kind: str
    features_uri: str
    keep: int
    batch_size: int
    gpu: bool
    shown_classes: int = 0
    shown_samples: int = 0

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.gpu else "cpu"

    def keep_from(self, start: int) -> int:
        """Of how many features are kept from image `start` on."""
        return max(0, self.keep - start)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is sampled, as plain data.

    Attributes:
        protocol: Meaning of the numbers.
        data_uri: The latent set, absolute.
        manifest: Its manifest.
        view: How samples are looked at.
    """

    protocol: Protocol
    data_uri: str
    manifest: LatentManifest
    view: View

    @property
    def subjects(self) -> int:
        """Classes, or rows with texts."""
        return self.manifest.num_classes or self.manifest.rows

    @property
    def real(self) -> DecodedSet:
        """The latent set."""
        return DecodedSet(self.data_uri, self.manifest)

    def shown_number(self, index: int, label: int) -> int | None:
        """Which of the kept images of its label or row sample `index` is; None: it is not kept."""
        number = index // self.subjects
        kept = label < self.view.shown_classes and number < self.view.shown_samples
        return number if kept else None

    def parts(self) -> list[tuple[int, int]]:
        """Stretches of equally many samples."""
        samples = self.protocol.samples
        return list(pairwise(samples * part // PARTS for part in range(PARTS + 1)))


class Viewer:
    """One process's share: the extractor stays loaded between pieces."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._device = torch.device(view.device)
        if view.device == "cpu":
            # An actor has one CPU, and its neighbours the others.
            torch.set_num_threads(1)
        extractor = load_extractor(view.kind, view.features_uri)
        self._dtype = dtype_of(extractor.precision)
        self._extractor = extractor.to(self._device, self._dtype)

    def real(self, images: RealImages, piece: Any) -> Measured:
        """A piece of some real images."""
        total = Measured(self._extractor, self._view.keep)
        numbers = [0] * self._view.shown_classes
        for batch, labels in images.batches(piece, self._view.batch_size):
            shown = {}
            for image, label in zip(batch, labels.tolist(), strict=True):
                if label < len(numbers) and numbers[label] < self._view.shown_samples:
                    shown[label, numbers[label]] = image
                    numbers[label] += 1
            total.update(self._extractor(batch), labels if images.labelled else None, shown)
        return total

    def peak_memory_mib(self) -> float:
        """See `peak_memory_mib`."""
        return peak_memory_mib()


class Evaluator(Viewer):
    """The same, with models. Runs in an actor, or by itself."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload.view)
        self._load = workload
        self._autoencoder = autoencoder_of(workload.manifest).to(self._device, self._dtype)
        self._samplers: dict[str, LatentSampler] = {}

    def reference(self, file: ReferenceFile) -> Reference:
        """What samples are compared with, made here if need be."""

        def look(images: RealImages) -> Iterator[Measured]:
            return (self.real(images, piece) for piece in images.pieces())

        return open_reference(file, self._load, self._extractor, look)

    def block(self, artifact_uri: str, steps: int, start: int, stop: int) -> Measured:
        """The samples [start, stop) of the model at `artifact_uri` in `steps` steps."""
        total = Measured(self._extractor, self._view.keep_from(start))
        load, protocol, size = self._load, self._load.protocol, self._view.batch_size
        texts = None
        if not load.real.labelled:
            texts = load.real.conditions(start, stop, size)
        for first in range(start, stop, size):
            last = min(first + size, stop)
            labels = protocol.sample_labels(first, last, load.subjects)
            seeds = protocol.sample_seeds(first, last)
            condition = labels if texts is None else next(texts)
            latents = self._sampler(artifact_uri)(seeds, condition, steps)
            images = quantise(self._autoencoder.decode(latents)).cpu()
            shown = {}
            for index, label, image in zip(
                range(first, last), labels.tolist(), images, strict=True
            ):
                number = load.shown_number(index, label)
                if number is not None:
                    shown[label, number] = image.clone()
            total.update(self._extractor(images), labels if texts is None else None, shown)
        return total

    def _sampler(self, uri: str) -> LatentSampler:
        if uri not in self._samplers:
            artifact = load_artifact(uri, "artifact")
            self._samplers[uri] = latent_sampler(artifact, self._device, self._dtype)
        return self._samplers[uri]


def open_reference(
    file: ReferenceFile,
    workload: Workload,
    extractor: Extractor,
    look: Callable[[RealImages], Iterable[Measured]],
) -> Reference:
    """Read a reference, or make it of the latent set.

    Args:
        file: Where it lies, or is to lie.
        workload: What is measured.
        extractor: In whose features.
        look: Looks at all pieces of some images, in their order.
    """
    view = workload.view
    if file.exists:
        return read_reference(file, extractor, look, view.keep)
    keep, shown = view.keep, view.shown_samples
    return make_reference(file.uri, workload.real, extractor, look, keep=keep, shown=shown)


class Pool:
    """Actors of the connected cluster; use as a context manager, which ends them.

    Args:
        kind: `Viewer`, or a class of its.
        given: What it is made of.
        view: The view in that.
        actors: How many, each with one CPU, and one GPU where the device is ``cuda``.
    """

    def __init__(self, kind: type[Viewer], given: object, view: View, actors: int) -> None:
        remote = ray.remote(
            num_cpus=1,
            num_gpus=int(view.gpu),
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )(kind)
        self._actors: list[Any] = [remote.remote(given) for _ in range(actors)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def real(self, images: RealImages) -> Iterator[Measured]:
        """All pieces of some real images, in their order."""
        return self.map(lambda actor, piece: actor.real.remote(images, piece), images.pieces())

    def peak_memory_mib(self) -> float:
        """Of the actor that had most."""
        return max(ray.get([actor.peak_memory_mib.remote() for actor in self._actors]))

    def map(self, submit: Callable[[Any, Any], Any], work: Iterable[Any]) -> Iterator[Measured]:
        """Results in the order of the work, whichever actor is faster."""
        yield from ActorPool(self._actors).map(submit, list(work))


class Engine(Pool):
    """Actors that sample.

    Args:
        workload: What they need to know.
        extractor: In whose features they measure.
        actors: How many.
        kept_uri: Folder for finished parts: a job that was interrupted goes on from them.
    """

    def __init__(
        self, workload: Workload, extractor: Extractor, actors: int, kept_uri: str
    ) -> None:
        super().__init__(Evaluator, workload, workload.view, actors)
        self._load, self._extractor, self._kept_uri = workload, extractor, kept_uri

    def reference(self, file: ReferenceFile) -> Reference:
        """What samples are compared with, made by the actors if need be."""
        return open_reference(file, self._load, self._extractor, self.real)

    def samples(self, model: ArtifactInfo, steps: int) -> list[Measured]:
        """All samples of a model in `steps` steps, in parts of equally many."""
        load = self._load
        progress = _Progress(f"{model.config.role} at {steps} step(s)", load.protocol.samples)
        names = {
            bounds: storage.join(
                self._kept_uri,
                f"{load.protocol.id}-{model.sha256[:12]}-{steps}-{bounds[0]}.safetensors",
            )
            for bounds in load.parts()
        }
        missing = [bounds for bounds, kept in names.items() if not storage.exists(kept)]
        # Of all parts in one stream, so that no actor waits for the end of a part.
        blocks = self.map(
            lambda actor, block: actor.block.remote(model.uri, steps, *block),
            (block for bounds in missing for block in _blocks(*bounds)),
        )
        parts = []
        for bounds, kept in names.items():
            part = Measured(self._extractor, load.view.keep_from(bounds[0]))
            if bounds in missing:
                for _ in _blocks(*bounds):
                    part.merge(block := next(blocks))
                    progress.add(block.statistics.count)
                storage.write_bytes(kept, safetensors.torch.save(part.state_dict()))
            else:
                part.load_state_dict(safetensors.torch.load(storage.read_bytes(kept)))
                progress.skip(bounds[1] - bounds[0])
            parts.append(part)
        return parts

    def forget(self) -> None:
        """Delete what would be gone on from."""
        for name in storage.list_files(self._kept_uri):
            storage.delete_file(storage.join(self._kept_uri, name))


def peak_memory_mib() -> float:
    """Most memory that this process has had, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, BLOCK_SAMPLES):
        yield first, min(first + BLOCK_SAMPLES, stop)


class _Progress:
    """Lines on the terminal, no more often than every few seconds."""

    _SECONDS = 5.0

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._done = self._computed = 0
        self._start: float | None = None
        self._told = time.monotonic()

    def skip(self, samples: int) -> None:
        """That many were there already."""
        self._done += samples

    def add(self, samples: int) -> None:
        """That many were computed."""
        self._done += samples
        now = time.monotonic()
        if self._start is None:
            # What it took till now was starting, too.
            self._start = now
            return
        self._computed += samples
        if now - self._told < self._SECONDS:
            return
        self._told, speed = now, self._computed / (now - self._start)
        print(
            f"{self._what} {self._done / self._total:4.0%}  {self._done:,}/{self._total:,} samples"
            f"  {speed:,.1f} images/s  {time_left(self._done, self._total, speed)}",
            flush=True,
        )
