"""One part of a latent set: rows in, a Parquet file with checksums and its statistics out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facm_core.errors import require
from facm_platform import storage
from facm_platform.latents.manifest import Part
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import (
    LatentShape,
    labels_of,
    latents_of,
    rebatch,
    row_bytes,
    schema,
)

# Small ones let a reader's shuffle window hold several, and cost little at its edges.
ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """What every part of a set has in common.

    Attributes:
        shape: (C, H, W) of one latent.
        dtype: ``float32`` or ``float16``.
        num_classes: Labels must be in [0, num_classes).
        row_group_bytes: Uncompressed bytes of a row group, at most (but at least one row).
    """

    shape: LatentShape
    dtype: str
    num_classes: int
    row_group_bytes: int = ROW_GROUP_BYTES

    @property
    def row_group_rows(self) -> int:
        """Rows of every row group but the last of a part."""
        return max(1, self.row_group_bytes // row_bytes(self.shape, self.dtype))


def part_name(index: int) -> str:
    """File name of part number `index`."""
    return f"part-{index:05d}.parquet"


def write_part(
    uri: str, name: str, tables: Iterable[pa.Table], layout: PartLayout
) -> tuple[Part, ChannelStatistics]:
    """Write rows (of `facm_platform.latents.tables.to_table`) as the part `name` of the set `uri`.

    Memory is bounded by one row group. Nothing becomes visible unless all of it is written.

    Raises:
        InvalidInputError: no rows, a latent that is not finite, or a label out of range.
    """
    row_groups: list[int] = []
    statistics = ChannelStatistics.empty(layout.shape[0])
    columns = schema(layout.shape, layout.dtype)
    with storage.output_file(storage.join(uri, name)) as file:
        with pq.ParquetWriter(
            file,
            columns,
            # Latents are noise to a compressor, and a dictionary of them is larger than they are.
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        ) as writer:
            for group in rebatch(tables, layout.row_group_rows):
                _check(group, name, layout)
                writer.write_table(group, row_group_size=len(group))
                row_groups.append(len(group))
                statistics = statistics.merge(ChannelStatistics.of(latents_of(group)))
        require(bool(row_groups), name, 0, "a part without rows", "Encode at least one image")
        part = Part(
            name=name,
            rows=sum(row_groups),
            bytes=file.stat().st_size,
            sha256=_sha256(file),
            row_groups=tuple(row_groups),
        )
    return part, statistics


def _check(group: pa.Table, name: str, layout: PartLayout) -> None:
    finite = np.isfinite(latents_of(group)).all(axis=(1, 2, 3))
    labels = labels_of(group)
    in_range = (labels >= 0) & (labels < layout.num_classes)
    for holds, problem in (
        (finite, "its latent is not finite"),
        (in_range, f"its label is not in [0, {layout.num_classes})"),
    ):
        bad = np.flatnonzero(~holds)
        if len(bad):
            key = group.column("key")[int(bad[0])].as_py()
            require(False, f"{name} key", key, problem, "Remove or mend this image")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
