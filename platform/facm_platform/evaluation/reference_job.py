"""Statistics of real images, made once: a reference for many evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from facm_core.errors import require, require_one_of
from facm_platform import storage
from facm_platform.cluster import connected, require_cpus
from facm_platform.config import JobResult
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.engine import Pool, View, Viewer
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.extractors import FITTED, KINDS, load_extractor
from facm_platform.evaluation.real import DecodedSet, RealImages, SourceImages, image_shape
from facm_platform.evaluation.reference import make_reference
from facm_platform.latents import LatentManifest
from facm_platform.latents.images import ImagesConfig, image_source
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Recipe of jobs/reference.py.

    Attributes:
        run: Name and place.
        data: A latent set, every row of which is decoded; or
        images: images as jobs/encode.py takes them, which are cut to a square.
        extractor: Kind of the feature extractor, as jobs/evaluate.py takes it.
        features_uri: Its address.
        output_uri: The file to write, a ``.safetensors``.
        keep: Features of so many images are kept, for kernel distance, precision and recall.
        batch_size: Images an actor looks at at once: memory and speed only.
        actors: Ray actors, one CPU each.
        gpu: One GPU for each actor.
    """

    run: RunConfig
    data: DataConfig | None = None
    images: ImagesConfig | None = None
    extractor: str = FITTED
    features_uri: str
    output_uri: str
    keep: int = 10_000
    batch_size: int = 64
    actors: int = 2
    gpu: bool = False

    def __post_init__(self) -> None:
        require_one_of("extractor", self.extractor, KINDS)
        one = (self.data is None) != (self.images is None)
        require(one, "data", self.data, "and images: not just one of them", "Give one of them")
        for name in ("keep", "batch_size", "actors"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(
            self.output_uri.endswith(".safetensors"),
            "output_uri",
            self.output_uri,
            "no .safetensors",
            "Name a file that ends so",
        )


@dataclass(frozen=True)
class ReferencePlan:
    """A validated `ReferenceConfig`.

    Attributes:
        config: What was asked for.
        output_uri: Absolute.
        images: What is looked at.
        extractor: By what.
    """

    config: ReferenceConfig
    output_uri: str
    images: RealImages
    extractor: Extractor

    def describe(self) -> str:
        """What would be looked at."""
        return (
            f"reference {self.config.run.name}: {self.images.kind} {self.images.id}, features "
            f"{self.extractor.describe}, on {self.config.actors} actors, to {self.output_uri}"
        )

    def execute(self) -> JobResult:
        """Look at all of them, and keep what is needed."""
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        tags = {"extractor_sha256": self.extractor.sha256, "images": self.images.id}
        run = open_run(store, config.run.name, job="reference", config=config, tags=tags)
        view = View(
            kind=config.extractor,
            features_uri=self.extractor.uri,
            keep=config.keep,
            batch_size=config.batch_size,
            gpu=config.gpu,
        )
        with run, connected():
            require_cpus("actors", config.actors, spare=0)
            with Pool(Viewer, view, view, config.actors) as pool:
                made = make_reference(
                    self.output_uri, self.images, self.extractor, pool.real, keep=config.keep
                )
            metrics = {"images": float(made.images)}
            run.log_metrics(metrics, images_seen=made.images)
        return JobResult(
            run_id=run.run_id,
            run_name=config.run.name,
            artifact_uri=self.output_uri,
            metrics=metrics,
        )


def prepare(config: ReferenceConfig) -> ReferencePlan:
    """Check everything that can be checked without a cluster.

    Raises:
        InvalidInputError: something missing or damaged, an extractor that cannot see these images,
            storage or MLflow out of reach.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    output_uri = storage.absolute(config.output_uri, "output_uri")
    storage.check_reachable(output_uri, "output_uri")
    extractor = load_extractor(config.extractor, config.features_uri)
    if config.data is not None:
        uri = storage.absolute(config.data.uri, "data.uri")
        manifest = LatentManifest.load(uri)
        extractor.check("features_uri", image_shape(manifest), manifest)
        return ReferencePlan(config, output_uri, DecodedSet(uri, manifest), extractor)
    assert config.images is not None
    source = image_source(config.images, "images")
    extractor.check("features_uri", source.image_shape)
    return ReferencePlan(config, output_uri, SourceImages(source), extractor)
