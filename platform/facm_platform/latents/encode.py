"""Images -> latent set: one Ray Data task for each part, the manifest last."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from facm_core.autoencoders import Autoencoder, load_autoencoder
from facm_core.errors import InvalidInputError, require, require_one_of
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.config.sections import RunConfig
from facm_platform.latents._ray_data import ordered_and_quiet
from facm_platform.latents.images import ImageSource, image_source
from facm_platform.latents.manifest import MANIFEST, LatentManifest, Part
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import DTYPES, to_table
from facm_platform.latents.writer import ROW_GROUP_BYTES, PartLayout, part_name, write_part
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)

# To be raised when equal configurations give other latents or another layout than before.
_ENCODER_VERSION = 1

_PART_NAME = re.compile(r"part-\d{5}\.parquet")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What `jobs/encode.py` takes.

    Attributes:
        run: Name and tracking.
        source: Named image source, see `facm_platform.latents.images`.
        output_uri: Folder or ``s3://`` address of the latent set.
        autoencoder: Named autoencoder, see `facm_core.autoencoders`.
        latent_dtype: ``float32`` or ``float16``, as stored.
        part_rows: Rows of every part but the last; one task writes one part.
        batch_size: Images the autoencoder sees at once; nothing but speed and memory.
        overwrite: Replace another set that lies at `output_uri`.
    """

    run: RunConfig
    source: str = "digits"
    output_uri: str
    autoencoder: str = "identity"
    latent_dtype: str = "float32"
    part_rows: int = 16_384
    batch_size: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_one_of("latent_dtype", self.latent_dtype, DTYPES)
        for name in ("part_rows", "batch_size"):
            value = getattr(self, name)
            require(value > 0, name, value, "not positive", "Give at least 1")


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """A validated encoding.

    Attributes:
        config: As given.
        output_uri: Absolute.
        source: The images.
        autoencoder: The map to latents.
        existing: The set that lies there already, if any.
    """

    config: EncodeConfig
    output_uri: str
    source: ImageSource
    autoencoder: Autoencoder
    existing: LatentManifest | None

    @property
    def is_done(self) -> bool:
        """Whether the set that lies there is the one asked for."""
        return self.existing is not None and self.existing.encoding_sha256 == self._sha256

    def describe(self) -> str:
        """What `execute` would do, in a line."""
        if self.is_done:
            return f"{self.output_uri} holds this latent set already: nothing to do"
        parts = -(-self.source.rows // self.config.part_rows)
        replaced = "" if self.existing is None else ", replacing the set there"
        return (
            f"encode {self.source.rows} images of {self.source.id} by {self.autoencoder.id} to "
            f"latents {self._layout.shape} {self._layout.dtype} in {parts} part(s) at "
            f"{self.output_uri}{replaced}"
        )

    def execute(self) -> JobResult:
        """Write the set, unless it is there already; either way under an MLflow run."""
        print(self.describe(), flush=True)
        run = self.config.run
        store = connect_store(run.tracking, embedded_root(run.storage_uri))
        with open_run(store, run.name, job="encode", config=self.config) as tracked:
            manifest = self.existing if self.is_done else None
            manifest = manifest or self._encode()
            metrics = {"rows": float(manifest.rows), "parts": float(len(manifest.parts))}
            tracked.log_metrics(metrics, images_seen=manifest.rows)
            tracked.set_tags({"manifest_sha256": manifest.sha256})
            tracked.log_text(storage.read_text(storage.join(self.output_uri, MANIFEST)), MANIFEST)
        return JobResult(
            run_id=tracked.run_id,
            run_name=run.name,
            artifact_uri=self.output_uri,
            metrics=metrics,
        )

    def _encode(self) -> LatentManifest:
        self._clear()
        parts: list[Part] = []
        statistics = ChannelStatistics.empty(self._layout.shape[0])
        with connected():
            for part, part_statistics in self._encoded_parts():
                parts.append(part)
                statistics = statistics.merge(part_statistics)
                print(f"{sum(p.rows for p in parts)} of {self.source.rows} images", flush=True)
        manifest = LatentManifest(
            rows=sum(part.rows for part in parts),
            latent_shape=self._layout.shape,
            latent_dtype=self._layout.dtype,
            num_classes=self._layout.num_classes,
            mean=tuple(statistics.mean.tolist()),
            std=tuple(statistics.std().tolist()),
            autoencoder_id=self.autoencoder.id,
            autoencoder_sha256=self.autoencoder.sha256,
            parts=tuple(parts),
            encoding_sha256=self._sha256,
            created_by=f"facm-platform encode {_ENCODER_VERSION}, pyarrow {pa.__version__}",
        )
        require(
            manifest.rows == self.source.rows,
            "source",
            self.source.id,
            f"{manifest.rows} of its {self.source.rows} images were encoded",
            "Run the encoding again",
        )
        manifest.save(self.output_uri)
        return manifest

    def _encoded_parts(self) -> Iterator[tuple[Part, ChannelStatistics]]:
        """Every part in order, each encoded and written by one Ray Data task."""
        rows, step = self.source.rows, self.config.part_rows
        todo = [
            {"index": index, "start": start, "stop": min(start + step, rows)}
            for index, start in enumerate(range(0, rows, step))
        ]
        encode_part = partial(
            _encode_part,
            source=self.source.id,
            autoencoder=self.autoencoder.id,
            batch_size=self.config.batch_size,
            uri=self.output_uri,
            layout=self._layout,
        )
        dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(encode_part)
        for row in ordered_and_quiet(dataset).iter_rows():
            yield _unpacked(json.loads(row["result"]))

    def _clear(self) -> None:
        """Take away the set that is replaced, or what an interrupted encoding left.

        The manifest goes first: from then on there is no set, rather than half of one.
        """
        storage.delete_file(storage.join(self.output_uri, MANIFEST))
        for name in storage.list_files(self.output_uri):
            if _PART_NAME.fullmatch(name):
                storage.delete_file(storage.join(self.output_uri, name))

    @property
    def _layout(self) -> PartLayout:
        return PartLayout(
            shape=self.autoencoder.latent_shape(self.source.image_shape),
            dtype=self.config.latent_dtype,
            num_classes=self.source.num_classes,
            row_group_bytes=ROW_GROUP_BYTES,
        )

    @property
    def _sha256(self) -> str:
        determining = {
            "encoder": _ENCODER_VERSION,
            "source": [self.source.id, self.source.sha256],
            "autoencoder": [self.autoencoder.id, self.autoencoder.sha256],
            "part_rows": self.config.part_rows,
            "layout": dataclasses.asdict(self._layout),
        }
        return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def prepare(config: EncodeConfig) -> EncodePlan:
    """Check everything that can be checked without a cluster.

    Raises:
        InvalidInputError: unknown source or autoencoder, an output that cannot be reached, that
            holds another set (unless `overwrite`) or files that are no latent set.
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    output_uri = storage.absolute(config.output_uri, "output_uri")
    source = image_source(config.source)
    autoencoder = load_autoencoder(config.autoencoder)
    storage.check_reachable(output_uri, "output_uri")
    plan = EncodePlan(
        config=config,
        output_uri=output_uri,
        source=source,
        autoencoder=autoencoder,
        existing=_existing(output_uri, config.overwrite),
    )
    require(
        plan.existing is None or plan.is_done or config.overwrite,
        "output_uri",
        config.output_uri,
        "another latent set lies there, made from another source or in another way",
        "Choose another folder, or give overwrite=true",
    )
    return plan


def _existing(uri: str, overwrite: bool) -> LatentManifest | None:
    names = storage.list_files(uri)
    if MANIFEST in names:
        try:
            return LatentManifest.load(uri, "output_uri")
        except InvalidInputError:
            # Damaged, and to be replaced anyway.
            if overwrite:
                return None
            raise
    foreign = [name for name in names if not _PART_NAME.fullmatch(name) and name[0] != "."]
    require(
        not foreign,
        "output_uri",
        uri,
        f"the folder holds files of something else ({', '.join(sorted(foreign)[:3])})",
        "Choose an empty folder",
    )
    return None


def _encode_part(
    row: dict[str, Any],
    source: str,
    autoencoder: str,
    batch_size: int,
    uri: str,
    layout: PartLayout,
) -> dict[str, Any]:
    """Encode and write the images [start, stop) of `row`; runs in a Ray worker."""
    tables = _encoded(
        _cached_source(source),
        _cached_autoencoder(autoencoder),
        range(row["start"], row["stop"]),
        batch_size,
        layout,
    )
    part, statistics = write_part(uri, part_name(row["index"]), tables, layout)
    return {"result": json.dumps(_packed(part, statistics))}


def _encoded(
    source: ImageSource,
    autoencoder: Autoencoder,
    images: range,
    batch_size: int,
    layout: PartLayout,
) -> Iterator[pa.Table]:
    for batch in source.batches(images.start, images.stop, batch_size):
        with torch.inference_mode():
            latents = autoencoder.encode(torch.from_numpy(batch.images)).numpy()
        yield to_table(latents.astype(np.dtype(layout.dtype)), batch.labels, batch.keys)


# Once per worker process, not once per part.
_cached_source = lru_cache(maxsize=1)(image_source)
_cached_autoencoder = lru_cache(maxsize=1)(load_autoencoder)


def _packed(part: Part, statistics: ChannelStatistics) -> dict[str, Any]:
    return {
        "part": dataclasses.asdict(part),
        "count": statistics.count,
        "mean": statistics.mean.tolist(),
        "m2": statistics.m2.tolist(),
    }


def _unpacked(values: dict[str, Any]) -> tuple[Part, ChannelStatistics]:
    part = values["part"] | {"row_groups": tuple(values["part"]["row_groups"])}
    statistics = ChannelStatistics(
        count=values["count"], mean=np.array(values["mean"]), m2=np.array(values["m2"])
    )
    return Part(**part), statistics
