"""A replica of the model: draws in batches, and follows the alias of the registered model."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from ray import serve
from ray.util.metrics import Counter, Gauge, Histogram

from facm_core.errors import InvalidInputError, require
from facm_platform.registry.artifact import load_artifact
from facm_platform.registry.generator import Generator, Subject
from facm_platform.registry.versions import Version, downloaded, find_version
from facm_platform.serving.config import ServeConfig
from facm_platform.tracking import new_client

logger = logging.getLogger("ray.serve")

_LONGEST_PAUSE_SECONDS = 60.0
_BATCH_IMAGES = [1.0, 2, 4, 8, 16, 32, 64, 128, 256]
_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to draw. Image k has the seed ``seed + k``.

    Attributes:
        label: Class, for a model of classes.
        prompt: Text, for a model of prompts.
        seed: Of the first image, from 0.
        count: Images.
        steps: Evaluations of the network; None for the fewest that the model is meant for.
    """

    label: int | None = None
    prompt: str | None = None
    seed: int
    count: int = 1
    steps: int | None = None

    @property
    def seeds(self) -> range:
        """One an image."""
        return range(self.seed, self.seed + self.count)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn, and by what.

    Attributes:
        version: Number of the registered version.
        sha256: Of its weights.
        steps: Evaluations of the network.
        images: uint8 (B, H, W, C).
    """

    version: str
    sha256: str
    steps: int
    images: np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a client needs to know of the served version; of no classes, it takes prompts."""

    model: str
    version: str
    sha256: str
    num_classes: int
    image_shape: tuple[int, ...]
    recommended_steps: tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """A version, ready to draw."""

    version: Version
    generator: Generator

    def draw(self, orders: Sequence[Order]) -> list[Drawn | InvalidInputError]:
        """All orders, those of one number of steps in one batch; what cannot be drawn, and why."""
        results: dict[int, Drawn | InvalidInputError] = {}
        groups: dict[int, list[int]] = defaultdict(list)
        subjects: dict[int, Subject] = {}
        for index, order in enumerate(orders):
            try:
                subjects[index] = self._subject(order)
            except InvalidInputError as error:
                results[index] = error
            else:
                groups[order.steps or self.generator.default_steps].append(index)
        for steps, group in groups.items():
            asked = [(subjects[index], orders[index]) for index in group]
            images = self._images(asked, steps)
            for index, drawn in zip(group, images, strict=True):
                results[index] = drawn
        return [results[index] for index in range(len(orders))]

    def _subject(self, order: Order) -> Subject:
        """Class or prompt, whichever the model takes.

        Raises:
            InvalidInputError: it is missing, the other one is there, or the model cannot draw it.
        """
        prompts = self.generator.takes_prompts
        taken, other = (order.prompt, order.label) if prompts else (order.label, order.prompt)
        for subject in (other, taken):
            if subject is not None:
                self.generator.check(subject, "class")
        field, remedy = ("prompt", "Say what to draw") if prompts else ("class", "Say which")
        if taken is None:
            raise InvalidInputError(field, None, "Field required", remedy)
        return taken

    def _images(self, asked: Sequence[tuple[Subject, Order]], steps: int) -> list[Drawn]:
        subjects: Any = [subject for subject, order in asked for _ in order.seeds]
        seeds = [seed for _, order in asked for seed in order.seeds]
        images = self.generator.generate(subjects, seeds, steps).permute(0, 2, 3, 1).numpy()
        ends = np.cumsum([order.count for _, order in asked])[:-1]
        return [
            Drawn(
                version=self.version.number,
                sha256=self.generator.sha256,
                steps=steps,
                # A copy: a view would send the whole batch along.
                images=part.copy(),
            )
            for part in np.split(images, ends)
        ]


def load_version(version: Version, tracking_uri: str, device: str = "cpu") -> Loaded:
    """Fetch a version and make it ready; it must be the one that was evaluated.

    Raises:
        InvalidInputError: its artefact is damaged, another one, or does not draw.
        MlflowException, OSError: it cannot be fetched.
    """
    with downloaded(version, tracking_uri) as folder:
        artifact = load_artifact(str(folder), "source")
        require(
            artifact.sha256 == version.tags.get("model_sha256"),
            "source",
            version.source,
            f"its weights have sha256 {artifact.sha256}, not the one evaluated",
            "Register it again with jobs/evaluate.py",
        )
        return Loaded(version, Generator(artifact, device))


def images_of(orders: Sequence[Order]) -> int:
    """Size of a batch."""
    return sum(order.count for order in orders)


class ModelReplica:
    """One process that draws.

    Args:
        config: What to serve.
        tracking_uri: Of the registry.
        first: The version that was made sure of at the start. Served where the alias leads to one
            that does not load when this process begins.
    """

    def __init__(self, config: ServeConfig, tracking_uri: str, first: Version) -> None:
        torch.set_num_threads(config.replicas.cpus)
        self._config = config
        self._tracking_uri = tracking_uri
        self._client = new_client(tracking_uri)
        self._device = "cuda" if config.replicas.gpu else "cpu"
        self._complaint = ""
        self._free = asyncio.Event()
        self._free.set()
        self._make_metrics()
        batching: Any = self._draw_batch
        batching.set_max_batch_size(config.batching.images)
        batching.set_batch_wait_timeout_s(config.batching.wait_seconds)
        self._loaded: Loaded | None = None
        self._follow()
        if self._loaded is None:
            self._serve(first)
        threading.Thread(target=self._watch, name="alias", daemon=True).start()

    def _make_metrics(self) -> None:
        tags = {"model": self._config.model}
        self._images = Counter(
            "facm_images", description="Images drawn.", tag_keys=("model", "version")
        ).set_default_tags(tags)
        self._batch_images = Histogram(
            "facm_batch_images",
            description="Images drawn at once.",
            boundaries=_BATCH_IMAGES,
            tag_keys=("model",),
        ).set_default_tags(tags)
        self._batch_seconds = Histogram(
            "facm_batch_seconds",
            description="Time to draw a batch.",
            boundaries=_SECONDS,
            tag_keys=("model",),
        ).set_default_tags(tags)
        self._failures = Counter(
            "facm_reload_failures",
            description="Looks at the registry that found nothing to serve.",
            tag_keys=("model",),
        ).set_default_tags(tags)
        self._version = Gauge(
            "facm_version", description="Version served.", tag_keys=("model",)
        ).set_default_tags(tags)

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds; Ray forgets a gauge that is not set for 20."""
        if self._loaded is not None:
            self._version.set(float(self._loaded.version.number))

    async def describe(self) -> Description:
        """The version in service."""
        generator = self._current.generator
        return Description(
            model=self._config.model,
            version=self._current.version.number,
            sha256=generator.sha256,
            num_classes=generator.num_classes,
            image_shape=generator.image_shape,
            recommended_steps=generator.config.recommended_nfe,
        )

    async def draw(self, order: Order) -> Drawn | InvalidInputError:
        """Draw together with what others order meanwhile; an error is returned, not raised."""
        # Serve closes a batch when its time is over, whether its turn has come or not. Those who
        # come while another is at work are held back here, or each few would be one of their own.
        await self._free.wait()
        return await self._draw_batch(order)

    @serve.batch(batch_size_fn=images_of)
    async def _draw_batch(self, orders: list[Order]) -> list[Drawn | InvalidInputError]:
        self._free.clear()
        # Taken once, so that a whole batch is of one version.
        loaded = self._current
        begin = time.perf_counter()
        try:
            # In a thread: this loop answers health checks, and fills the next batch.
            results = await asyncio.to_thread(loaded.draw, orders)
        finally:
            self._free.set()
        self._batch_seconds.observe(time.perf_counter() - begin)
        self._batch_images.observe(images_of(orders))
        self._images.inc(images_of(orders), tags={"version": loaded.version.number})
        return results

    @property
    def _current(self) -> Loaded:
        assert self._loaded is not None
        return self._loaded

    def _watch(self) -> None:
        pause = self._config.poll_seconds
        while True:
            time.sleep(pause)
            if self._follow():
                pause = self._config.poll_seconds
            else:
                # A damaged version is not fetched again every few seconds.
                pause = max(pause, min(2 * pause, _LONGEST_PAUSE_SECONDS))

    def _follow(self) -> bool:
        """Serve what the alias leads to. If that cannot be, what is served stays."""
        try:
            version = find_version(self._client, self._config.model, self._config.alias)
            if version is None:
                return self._complain("there is no such alias any more")
            if self._loaded is None or version != self._loaded.version:
                self._serve(version)
        except (InvalidInputError, MlflowException, OSError, RuntimeError) as error:
            return self._complain(str(error))
        self._complaint = ""
        return True

    def _serve(self, version: Version) -> None:
        """Load beside the old version, then put it in its place."""
        self._loaded = load_version(version, self._tracking_uri, self._device)
        print(f"serving {version} (sha256 {self._loaded.generator.sha256})", flush=True)

    def _complain(self, reason: str) -> Literal[False]:
        """Count every time, tell once."""
        self._failures.inc()
        if reason != self._complaint:
            stays = f"; {self._loaded.version} stays" if self._loaded else ""
            logger.error("%s@%s: %s%s", self._config.model, self._config.alias, reason, stays)
        self._complaint = reason
        return False
