"""One part of a latent set: rows in, a Parquet file with checksums and its statistics out."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facm_core.errors import require
from facm_platform import storage
from facm_platform.latents.manifest import Part
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import KEY, LABEL, RowFormat, rebatch, values_of

# Readers shuffle a few whole row groups together: small ones keep that cheap.
ROW_GROUP_BYTES = 16 << 20


def write_part(
    uri: str,
    name: str,
    tables: Iterable[pa.Table],
    format: RowFormat,
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> tuple[Part, ChannelStatistics]:
    """Write rows as the part `name` of the set `uri`.

    Memory is bounded by one row group. Nothing becomes visible unless all of it is written.

    Args:
        uri: Address of the set.
        name: File name.
        tables: Rows of `format`.
        format: Of the set.
        row_group_bytes: Of a row group in memory, at most (but at least one row).

    Raises:
        InvalidInputError: no rows, a latent or text that is not finite, a label out of range.
    """
    row_groups: list[int] = []
    statistics = ChannelStatistics.empty(format.latent_shape[0])
    with storage.output_file(storage.join(uri, name)) as file:
        with pq.ParquetWriter(
            file,
            format.schema,
            # Latents are noise to a compressor, and a dictionary of them is larger than they are.
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
            # A column of a row group is a page, which is read faster than many.
            data_page_size=2 * row_group_bytes,
        ) as writer:
            for group in rebatch(tables, repeat(max(1, row_group_bytes // format.row_bytes))):
                _check(group, name, format)
                writer.write_table(group, row_group_size=len(group))
                row_groups.append(len(group))
                for column in format.latent_columns:
                    latents = values_of(group, column)
                    statistics = statistics.merge(ChannelStatistics.of(latents, format.moments))
        require(bool(row_groups), name, 0, "a part without rows", "Encode at least one image")
        part = Part(
            name=name,
            rows=sum(row_groups),
            bytes=file.stat().st_size,
            sha256=storage.file_sha256(file),
            row_groups=tuple(row_groups),
        )
    return part, statistics


def _check(group: pa.Table, name: str, format: RowFormat) -> None:
    for column, (dtype, shape) in format.tensors.items():
        if np.issubdtype(dtype, np.floating):
            axes = tuple(range(1, 1 + len(shape)))
            finite = np.isfinite(values_of(group, column)).all(axis=axes)
            _require_all(finite, group, name, f"its {column} is not finite")
    if format.num_classes:
        labels = values_of(group, LABEL)
        in_range = (labels >= 0) & (labels < format.num_classes)
        _require_all(in_range, group, name, f"its label is not in [0, {format.num_classes})")


def _require_all(holds: np.ndarray, group: pa.Table, name: str, problem: str) -> None:
    bad = np.flatnonzero(~holds)
    if len(bad):
        key = group.column(KEY)[int(bad[0])].as_py()
        require(False, f"{name} key", key, problem, "Remove or mend this row at its source")
