"""Fitting the feature extractor to a latent set: one small task, the same numbers every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from facm_core.errors import require
from facm_core.pixels import dequantise
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.features import Classifier, FeaturesInfo, save_features
from facm_platform.evaluation.real import DecodedSet, image_shape
from facm_platform.latents import LatentManifest
from facm_platform.storage import absolute, check_reachable
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

_TEST_SHARE = 0.2
_BATCH = 64
_LEARNING_RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """A feature extractor to be fitted to a set of small images, which is held in memory.

    Attributes:
        run: Name and tracking.
        data: The latent set. A fixed fifth of it is held out to measure the accuracy.
        output_uri: Folder or ``s3://`` prefix for the extractor.
        name: Short name of the extractor, part of every protocol id that uses it.
        epochs: Passes over the training part.
        seed: Of initial weights and order; the split does not depend on it.
    """

    run: RunConfig
    data: DataConfig
    output_uri: str
    name: str = "cnn"
    epochs: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.name.isidentifier(), "name", self.name, "not a short name", "Use e.g. digits")
        require(self.epochs >= 1, "epochs", self.epochs, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use 0 or more")


@dataclass(frozen=True)
class FeaturesPlan:
    """A validated `FeaturesConfig`."""

    config: FeaturesConfig
    manifest: LatentManifest
    info: FeaturesInfo

    def describe(self) -> str:
        """What would be fitted."""
        return (
            f"fit features {self.info.name!r} ({self.info.dimension}-d, {self.info.num_classes}"
            f" classes) to {self.manifest.rows} rows of {self.config.data.uri}"
            f" -> {self.config.output_uri}"
        )

    def execute(self) -> JobResult:
        """Fit it in one Ray task and keep it."""
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        lineage = {"manifest_sha256": self.manifest.sha256}
        run = open_run(store, config.run.name, job="fit_features", config=config, tags=lineage)
        with run, connected():
            task = _fit_and_save.remote(
                absolute(config.data.uri, "data.uri"),
                absolute(config.output_uri, "output_uri"),
                *(self.manifest, self.info, config.epochs, config.seed),
            )
            sha256, accuracy = ray.get(task)
            run.set_tags({"extractor_sha256": sha256})
            run.log_metrics({"test_accuracy": accuracy}, images_seen=0)
        return JobResult(
            run_id=run.run_id,
            run_name=config.run.name,
            artifact_uri=absolute(config.output_uri, "output_uri"),
            metrics={"test_accuracy": accuracy},
        )


def prepare(config: FeaturesConfig) -> FeaturesPlan:
    """Validate everything reachable.

    Raises:
        InvalidInputError: no latent set, images of an unusable size, storage out of reach.
    """
    check_run_name("run.name", config.run.name)
    manifest = LatentManifest.load(config.data.uri)
    require(
        manifest.num_classes > 0,
        "data.uri",
        config.data.uri,
        "its rows have texts, and a classifier is fitted to labels",
        "Use a set with labels, of images like these; it will do for both",
    )
    check_reachable(absolute(config.output_uri, "output_uri"), "output_uri")
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    channels, height, width = image_shape(manifest)
    require(
        height == width,
        "data.uri",
        config.data.uri,
        f"its images are {height}×{width}",
        "Use a set of square images",
    )
    info = FeaturesInfo(
        name=config.name,
        channels=channels,
        size=height,
        num_classes=manifest.num_classes,
        test_accuracy=0.0,
        latent_manifest_sha256=manifest.sha256,
    )
    return FeaturesPlan(config, manifest, info)


def fit(
    uri: str, manifest: LatentManifest, info: FeaturesInfo, *, epochs: int, seed: int
) -> tuple[Classifier, float]:
    """Fit a classifier to the set at `uri`; the same weights every time on the same machine.

    Returns:
        The network and its accuracy on the held-out rows.
    """
    real = DecodedSet(uri, manifest)
    batches = [batch for piece in real.pieces() for batch in real.batches(piece, 256)]
    images = dequantise(torch.cat([images for images, _ in batches]), torch.float32)
    labels = torch.cat([labels for _, labels in batches])
    order = torch.randperm(len(images), generator=Generator().manual_seed(0))
    test, train = order.split(
        [int(_TEST_SHARE * len(order)), len(order) - int(_TEST_SHARE * len(order))]
    )
    with _reproducible(seed):
        network = Classifier(info)
        _descend(network, images[train], labels[train], epochs, Generator().manual_seed(seed))
        with torch.no_grad():
            _, logits = network(images[test])
    return network, float((logits.argmax(1) == labels[test]).double().mean())


def _descend(
    network: Classifier, images: Tensor, labels: Tensor, epochs: int, generator: Generator
) -> None:
    # No augmentation, no label smoothing, few epochs: each would gain accuracy by making features
    # blind to what a Fréchet distance must see, such as blur, displacement and missing variety.
    batch = min(_BATCH, len(images))
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=epochs * steps
    )
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps * batch].split(batch):
            _, logits = network(images[rows])
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """One thread, deterministic kernels, a seed of its own; the process's settings come back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
            torch.set_num_threads(threads)


@ray.remote(num_cpus=1)
def _fit_and_save(
    data_uri: str,
    output_uri: str,
    manifest: LatentManifest,
    info: FeaturesInfo,
    epochs: int,
    seed: int,
) -> tuple[str, float]:
    network, accuracy = fit(data_uri, manifest, info, epochs=epochs, seed=seed)
    kept = save_features(output_uri, network, replace(info, test_accuracy=accuracy))
    return kept.sha256, accuracy
