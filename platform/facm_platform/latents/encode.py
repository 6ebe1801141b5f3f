"""Images -> latent set."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from facm_core.errors import require, require_one_of
from facm_platform import storage
from facm_platform.config.sections import RunConfig
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.build import BuildersConfig, BuildPlan, Piece, SetBuild
from facm_platform.latents.captions import Embedder, TextConfig
from facm_platform.latents.images import (
    BrokenImageError,
    ImagesConfig,
    ImageSource,
    Sample,
    image_source,
)
from facm_platform.latents.manifest import Quarantined
from facm_platform.latents.null_text import NullText
from facm_platform.latents.tables import DTYPES, KEY, LABEL, LATENT, LATENT_FLIP, RowFormat
from facm_platform.latents.text_encoder import (
    TextEncoderInfo,
    find_text_encoder,
    open_text_encoder,
)
from facm_platform.tracking import check_run_name, check_store, embedded_root

# To be raised when equal configurations give other latents or another layout than before.
_ENCODER_VERSION = 2
_STORED = ("sample", "moments")

_Loaded = tuple[NDArray[np.float32], str]
"""An image, and the text beside it where texts are read."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What `jobs/encode.py` takes.

    Attributes:
        run: Name and tracking.
        source: The images, see `facm_platform.latents.images`.
        output_uri: Folder or ``s3://`` address of the latent set.
        autoencoder: ``identity``, or folder or file of the weights, see
            `facm_core.autoencoders.load_autoencoder`.
        stored: ``sample``: one draw of each latent, by its key and `seed`; ``moments``: mean and
            log-variance, from which every epoch draws anew.
        text: Captions of the images, which rows then have instead of labels.
        flip: Also store the latent of every mirrored image.
        seed: Of the order of the images, and of samples.
        latent_dtype: ``float32`` or ``float16``, as stored.
        part_rows: Images of a part, at most.
        batch_size: Images the autoencoder sees at once; on a GPU it computes in bfloat16, as does
            the text encoder.
        max_quarantined: Share of the images that may be broken; they are listed in the manifest.
        workers: Who encodes.
        overwrite: Replace another set that lies at `output_uri`.
    """

    run: RunConfig
    source: ImagesConfig = field(default_factory=ImagesConfig)
    output_uri: str
    autoencoder: str = "identity"
    stored: str = "sample"
    text: TextConfig | None = None
    flip: bool = False
    seed: int = 0
    latent_dtype: str = "float32"
    part_rows: int = 16_384
    batch_size: int = 256
    max_quarantined: float = 0.01
    workers: BuildersConfig = field(default_factory=BuildersConfig)
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_one_of("latent_dtype", self.latent_dtype, DTYPES)
        require_one_of("stored", self.stored, _STORED)
        for name in ("part_rows", "batch_size"):
            value = getattr(self, name)
            require(value > 0, name, value, "not positive", "Give at least 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Give 0 or more")
        share = self.max_quarantined
        require(0 <= share < 1, "max_quarantined", share, "not a share", "Give 0 ... 0.99")


def prepare(config: EncodeConfig) -> BuildPlan:
    """Check everything that can be checked without a cluster.

    Raises:
        InvalidInputError: images, autoencoder or text encoder that cannot be read, or do not fit
            each other; captions of what there is not; an output that cannot be reached, that holds
            another set (unless `overwrite`) or files that are no latent set.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    output_uri = storage.absolute(config.output_uri, "output_uri")
    text = config.text
    source = image_source(
        config.source, labels=text is None, texts=text is not None and text.has("text")
    )
    autoencoder = open_autoencoder(config.autoencoder)
    require(
        autoencoder.stochastic or config.stored != "moments",
        "stored",
        config.stored,
        f"the autoencoder {config.autoencoder} has no log-variance",
        "Use stored=sample",
    )
    encoder = None if text is None else _found_encoder(text, source)
    format = RowFormat(
        latent_shape=autoencoder.latent_shape(source.image_shape),
        latent_dtype=config.latent_dtype,
        moments=config.stored == "moments",
        flip=config.flip,
        num_classes=0 if encoder else source.num_classes,
        text_shape=encoder.text_shape if encoder else (),
    )
    determining: dict[str, Any] = {
        "encoder": _ENCODER_VERSION,
        "source": source.id,
        "autoencoder": autoencoder.sha256,
        "format": dataclasses.asdict(format),
        **{name: getattr(config, name) for name in ("seed", "part_rows", "batch_size")},
    }
    if autoencoder.normalisation is not None:
        determining["normalisation"] = autoencoder.normalisation
    if text and encoder:
        determining["text"] = [encoder.sha256, text.caption, text.tokens]
    build = SetBuild(
        uri=output_uri,
        format=format,
        sha256=hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest(),
        pieces=partial(source.pieces, config.part_rows, config.seed),
        reader=partial(ImageReader, config, source, format, autoencoder.sha256, encoder),
        workers=config.workers,
        manifest={
            "autoencoder_id": autoencoder.id,
            "autoencoder_sha256": autoencoder.sha256,
            "class_names": () if encoder else source.class_names,
            "created_by": f"facm-platform encode {_ENCODER_VERSION}, pyarrow {pa.__version__}",
        },
        normalisation=autoencoder.normalisation,
        max_quarantined=config.max_quarantined,
        overwrite=config.overwrite,
    )
    return BuildPlan(
        job="encode",
        config=config,
        run=config.run,
        build=build,
        what=f"{source.id} by {autoencoder.id}",
        made=build.finished(),
        made_from={"text_encoder_sha256": encoder.sha256} if encoder else {},
    )


def _found_encoder(text: TextConfig, source: ImageSource) -> TextEncoderInfo:
    """The text encoder, after making sure that there is something to embed."""
    require(
        bool(source.class_names) or not text.has("class"),
        "text.caption",
        text.caption,
        "the names of the classes are not known",
        "Use {text}, or source.kind=folder with a folder for each class",
    )
    return find_text_encoder(text.encoder, text.tokens)


class ImageReader:
    """Encodes images; one for each worker process.

    Args:
        config: The job's.
        source: The images.
        format: Of the set.
        autoencoder_sha256: The hash that the job saw.
        encoder: What embeds the captions, as the job saw it; None for labels.
    """

    def __init__(
        self,
        config: EncodeConfig,
        source: ImageSource,
        format: RowFormat,
        autoencoder_sha256: str,
        encoder: TextEncoderInfo | None,
    ) -> None:
        self._config, self._source, self._format = config, source, format
        self._device = torch.device("cuda" if config.workers.gpu else "cpu")
        autoencoder = open_autoencoder(config.autoencoder, autoencoder_sha256)
        dtype = torch.bfloat16 if config.workers.gpu else torch.float32
        self._autoencoder = autoencoder.to(self._device, dtype)
        self._texts = None
        if encoder is not None:
            opened = open_text_encoder(encoder.id, encoder.text_shape[0], encoder.sha256)
            self._texts = Embedder(opened.to(self._device, dtype))
        torch.set_num_threads(config.workers.cpus)

    def null_text(self) -> NullText | None:
        """The null prompt; None for labels."""
        return self._texts.null if self._texts else None

    def rows(self, piece: Piece) -> Iterator[pa.Table | Quarantined]:
        """The latents of the images of `piece`, and the images that are broken."""
        batch: list[tuple[Sample, _Loaded]] = []
        for sample, loaded in self._loaded(self._source.samples(piece)):
            if isinstance(loaded, BrokenImageError):
                yield Quarantined(key=sample.key, reason=str(loaded))
                continue
            batch.append((sample, loaded))
            if len(batch) == self._config.batch_size:
                yield self._encoded(batch)
                batch = []
        if batch:
            yield self._encoded(batch)

    def _loaded(
        self, samples: Iterator[Sample]
    ) -> Iterator[tuple[Sample, _Loaded | BrokenImageError]]:
        """Every sample with its image, in order; a batch of them is being decoded ahead."""
        coming: deque[tuple[Sample, Future[_Loaded | BrokenImageError]]] = deque()
        with ThreadPoolExecutor(self._config.workers.cpus) as threads:
            for sample in samples:
                coming.append((sample, threads.submit(_load, sample)))
                if len(coming) > self._config.batch_size:
                    ready, loaded = coming.popleft()
                    yield ready, loaded.result()
            for ready, loaded in coming:
                yield ready, loaded.result()

    def _encoded(self, batch: list[tuple[Sample, _Loaded]]) -> pa.Table:
        images = torch.from_numpy(np.stack([image for _, (image, _) in batch])).to(self._device)
        keys = [sample.key for sample, _ in batch]
        values: dict[str, Any] = {KEY: keys, LATENT: self._latents(images, keys)}
        if self._texts is None:
            values[LABEL] = [sample.label for sample, _ in batch]
        else:
            captions = [self._caption(sample.label, text) for sample, (_, text) in batch]
            values |= self._texts.columns(captions)
        if self._format.flip:
            values[LATENT_FLIP] = self._latents(images.flip(-1), [f"{key}|flip" for key in keys])
        return self._format.table(values)

    def _caption(self, label: int, text: str) -> str:
        assert self._config.text is not None
        names = self._source.class_names
        return self._config.text.of(names[label] if names else "", text)

    def _latents(self, images: torch.Tensor, keys: list[str]) -> NDArray[np.float32]:
        moments = self._autoencoder.encode(images)
        if moments.log_variance is None:
            stored = moments.mean
        elif self._format.moments:
            stored = torch.cat([moments.mean, moments.log_variance], 1)
        else:
            shape = self._format.latent_shape
            noise = np.stack([_noise(self._config.seed, key, shape) for key in keys])
            stored = moments.sample(torch.from_numpy(noise).to(self._device))
        return stored.cpu().numpy()


def _load(sample: Sample) -> _Loaded | BrokenImageError:
    try:
        return sample.load(), sample.load_text() if sample.load_text else ""
    except BrokenImageError as error:
        return error


def _noise(seed: int, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Noise of one key, whatever else is encoded with it."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32)
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *map(int, words)])))
    return random.standard_normal(shape, np.float32)
