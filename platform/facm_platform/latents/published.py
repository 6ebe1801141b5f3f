"""Latents in the layout of the published LightningDiT and FACM code: read, and written back.

A folder of ``latents_rank00_shard000.safetensors`` and so on, each with ``latents`` (N, C, H, W)
and either ``labels`` (N,) or ``text_embedding`` (N, L, D) and ``text_mask`` (N, L); often
``latents_flip``; and beside them ``latents_stats.pt`` or ``.safetensors``, ``mean`` and ``std``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from facm_core.checkpoints import read_checkpoint
from facm_core.errors import require, require_one_of
from facm_platform import storage
from facm_platform.config import JobResult
from facm_platform.config.sections import RunConfig
from facm_platform.latents.autoencoder import open_autoencoder
from facm_platform.latents.build import BuildersConfig, BuildPlan, Floats, Piece, SetBuild
from facm_platform.latents.manifest import LatentManifest, Quarantined
from facm_platform.latents.null_text import NullText
from facm_platform.latents.parts import opened_part
from facm_platform.latents.tables import (
    KEY,
    LABEL,
    LATENT,
    LATENT_FLIP,
    TEXT_EMBEDDING,
    TEXT_MASK,
    RowFormat,
    values_of,
)
from facm_platform.tracking import check_run_name, check_store, embedded_root

_IMPORTER_VERSION = 1
_SHARDS = "latents_rank*_shard*.safetensors"
_STATISTICS = ("latents_stats.safetensors", "latents_stats.pt")
_NAMES = {
    LATENT: "latents",
    LATENT_FLIP: "latents_flip",
    LABEL: "labels",
    TEXT_EMBEDDING: TEXT_EMBEDDING,
    TEXT_MASK: TEXT_MASK,
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "float32"}
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What `jobs/import_latents.py` takes.

    Attributes:
        run: Name and tracking.
        source_uri: Folder of the published files, local or ``s3://``.
        output_uri: Folder or ``s3://`` address of the latent set.
        num_classes: Labels are in [0, num_classes); 0 for latents with texts.
        autoencoder: What decodes the latents: folder or file of the weights, or ``identity``.
        statistics: ``computed`` over every row; or ``given``: those that lie beside the latents,
            for models that were trained under them.
        workers: Who converts.
        overwrite: Replace another set that lies at `output_uri`.
    """

    run: RunConfig
    source_uri: str
    output_uri: str
    num_classes: int = 0
    autoencoder: str
    statistics: str = "computed"
    workers: BuildersConfig = field(default_factory=BuildersConfig)
    overwrite: bool = False

    def __post_init__(self) -> None:
        require_one_of("statistics", self.statistics, ("computed", "given"))
        require(
            self.num_classes >= 0, "num_classes", self.num_classes, "negative", "Give 0 or more"
        )


def prepare(config: ImportConfig) -> BuildPlan:
    """Check everything that can be checked without a cluster; of the shards, the first one.

    Raises:
        InvalidInputError: no shards, tensors that are no latent set, statistics that are missing
            or do not fit, or an output that is taken (see `SetBuild.finished`).
    """
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    source_uri = storage.absolute(config.source_uri, "source_uri")
    output_uri = storage.absolute(config.output_uri, "output_uri")
    storage.check_reachable(source_uri, "source_uri")
    sizes = storage.list_files(source_uri)
    shards = {name: sizes[name] for name in sorted(fnmatch.filter(sizes, _SHARDS))}
    require(
        bool(shards),
        "source_uri",
        config.source_uri,
        f"there are no files {_SHARDS}",
        "Give the folder that the published extraction wrote",
    )
    format = _format(storage.join(source_uri, next(iter(shards))), config)
    autoencoder = open_autoencoder(config.autoencoder)
    determining = {
        "importer": _IMPORTER_VERSION,
        "shards": shards,
        "source": source_uri,
        "autoencoder": autoencoder.sha256,
        "format": dataclasses.asdict(format),
        "statistics": config.statistics,
    }
    given = config.statistics == "given"
    build = SetBuild(
        uri=output_uri,
        format=format,
        sha256=hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest(),
        pieces=partial(_pieces, tuple(shards)),
        reader=partial(ShardReader, source_uri, format),
        workers=config.workers,
        manifest={
            "autoencoder_id": autoencoder.id,
            "autoencoder_sha256": autoencoder.sha256,
            "created_by": f"facm-platform import {_IMPORTER_VERSION}, pyarrow {pa.__version__}",
        },
        normalisation=_given_statistics(source_uri, sizes, format) if given else None,
        is_of_rows=True,
        max_quarantined=0.0,
        overwrite=config.overwrite,
    )
    return BuildPlan(
        job="import",
        config=config,
        run=config.run,
        build=build,
        what=f"{len(shards)} shards of {source_uri}",
        made=build.finished(),
    )


class ShardReader:
    """Reads shards; one for each worker process.

    Args:
        uri: Their folder.
        format: Of the set.
    """

    def __init__(self, uri: str, format: RowFormat) -> None:
        self._uri, self._format = uri, format

    def null_text(self) -> NullText | None:
        """Not known: nothing says by what the texts were embedded."""
        return None

    def rows(self, piece: Piece) -> Iterator[pa.Table | Quarantined]:
        """All rows of the shard that `piece` names, in order."""
        name = piece["shard"]
        uri = storage.join(self._uri, name)
        _check_header(_header(uri), self._format, uri)
        columns = [column for column in self._format.schema.names if column != KEY]
        with storage.local_copy(uri) as path, safe_open(path, "pt") as file:
            rows = file.get_slice(_NAMES[LATENT]).get_shape()[0]
            for start in range(0, rows, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, rows)
                values: dict[str, Any] = {
                    column: _array(file.get_slice(_NAMES[column])[start:stop]) for column in columns
                }
                values[KEY] = [f"{name}#{row}" for row in range(start, stop)]
                yield self._format.table(values)


def export(uri: str, folder: str) -> JobResult:
    """Write a latent set in the published layout, a file for each part.

    Raises:
        InvalidInputError: no such set, one that stores moments (which the layout has no place
            for), or `folder` is not empty.
    """
    uri, folder = storage.absolute(uri), storage.absolute(folder, "folder")
    manifest = LatentManifest.load(uri, "uri")
    require(not manifest.moments, "uri", uri, "the set stores moments", "Export one of samples")
    storage.check_reachable(folder, "folder")
    require(not storage.list_files(folder), "folder", folder, "not empty", "Choose another one")
    for index in range(len(manifest.parts)):
        _export_part(uri, folder, manifest, index)
    statistics = {
        name: torch.tensor(getattr(manifest, name), dtype=torch.float64).reshape(1, -1, 1, 1)
        for name in ("mean", "std")
    }
    with storage.output_file(storage.join(folder, _STATISTICS[0])) as path:
        save_file(statistics, path)
    return JobResult(
        run_id=None,
        run_name="latents export",
        artifact_uri=folder,
        metrics={"rows": float(manifest.rows), "files": float(len(manifest.parts))},
    )


def _export_part(uri: str, folder_uri: str, manifest: LatentManifest, index: int) -> None:
    with opened_part(storage.join(uri, manifest.parts[index].name)) as file:
        table = file.read()
    tensors = {
        _NAMES[column]: torch.from_numpy(values_of(table, column).copy())
        for column in manifest.schema.names
        if column != KEY
    }
    name = f"latents_rank00_shard{index:03d}.safetensors"
    with storage.output_file(storage.join(folder_uri, name)) as file:
        save_file(tensors, file)


def _pieces(shards: tuple[str, ...]) -> Iterator[Piece]:
    for shard in shards:
        yield {"shard": shard}


def _format(uri: str, config: ImportConfig) -> RowFormat:
    """The columns of a set of shards like the one at `uri`."""
    header = _header(uri)
    latents = header.get(_NAMES[LATENT], {})
    shape = tuple(latents.get("shape", ()))
    dtype = _DTYPES.get(latents.get("dtype", ""), "")
    require(
        len(shape) == 4 and dtype != "",
        "source_uri",
        uri,
        f"its tensor latents is {latents or 'missing'}",
        "Give latents (N, C, H, W) in float32, float16 or bfloat16",
    )
    text = header.get(TEXT_EMBEDDING)
    require(
        (text is None) == (config.num_classes > 0),
        "num_classes",
        config.num_classes,
        f"the shards have {'labels' if text is None else 'texts'}",
        "Give the number of classes for labels, and 0 for texts",
    )
    format = RowFormat(
        latent_shape=(shape[1], shape[2], shape[3]),
        latent_dtype=dtype,
        flip=_NAMES[LATENT_FLIP] in header,
        num_classes=config.num_classes,
        text_shape=tuple(text["shape"][1:]) if text else (),
        text_dtype=_DTYPES.get(text["dtype"], text["dtype"]) if text else "float16",
    )
    _check_header(header, format, uri)
    return format


def _check_header(header: dict[str, Any], format: RowFormat, uri: str) -> None:
    """Make sure that a shard has the columns of the set, and as many rows of each."""
    expected = {_NAMES[column] for column in format.schema.names if column != KEY}
    remedy = "All shards need the same tensors, with as many rows each"
    require(
        header.keys() == expected,
        "source_uri",
        uri,
        f"it has {sorted(header)}, not {sorted(expected)}",
        remedy,
    )
    rows = header[_NAMES[LATENT]]["shape"][0]
    for column in format.schema.names[:-1]:
        found = header[_NAMES[column]]
        dtype, shape = format.tensors.get(column, ("int64", ()))
        fits = found["shape"] == [rows, *shape]
        if np.issubdtype(dtype, np.floating):
            fits &= _DTYPES.get(found["dtype"]) == dtype
        require(
            fits,
            "source_uri",
            uri,
            f"{_NAMES[column]} is {found['dtype']} {found['shape']}, not {dtype} {[rows, *shape]}",
            remedy,
        )


def _header(uri: str) -> dict[str, Any]:
    """Dtype and shape of each tensor of a safetensors file, of which no more is read."""
    store, path = storage.filesystem(uri)
    with storage.explained(uri, "source_uri"), store.open_input_file(path) as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = file.read(size) if 0 < size <= file.size() else b""
    try:
        values: dict[str, Any] = json.loads(header)
    except ValueError:
        values = {}
    require(bool(values), "source_uri", uri, "not a safetensors file", "Extract this shard again")
    values.pop("__metadata__", None)
    return values


def _given_statistics(
    source_uri: str, sizes: dict[str, int], format: RowFormat
) -> tuple[Floats, Floats]:
    found = [name for name in _STATISTICS if name in sizes]
    require(
        bool(found),
        "statistics",
        "given",
        f"{source_uri} has neither of {', '.join(_STATISTICS)}",
        "Use statistics=computed",
    )
    uri = storage.join(source_uri, found[0])
    with storage.local_copy(uri) as path:
        content = read_checkpoint(path, "source_uri")
    channels = format.latent_shape[0]
    for name in ("mean", "std"):
        require(
            isinstance(content.get(name), torch.Tensor) and content[name].numel() == channels,
            "source_uri",
            uri,
            f"{name} is not one number for each of {channels} channels",
            "Use statistics=computed",
        )
    mean, std = (tuple(content[name].double().flatten().tolist()) for name in ("mean", "std"))
    return mean, std


def _array(values: torch.Tensor) -> NDArray[Any]:
    # numpy has no bfloat16; float32 holds all its numbers.
    array: NDArray[Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array
