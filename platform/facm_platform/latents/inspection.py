"""What a latent set holds, whether its bytes are the right ones, and whether its statistics are.

No cluster: threads read the parts, because hashing and Parquet let go of Python's lock.
"""

from __future__ import annotations

import dataclasses
import hashlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.config.job import JobResult, Refused
from facm_platform.latents.manifest import GIVEN, LatentManifest, Part
from facm_platform.latents.parts import bad_part, first_line, opened_part
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import LABEL, RowFormat, rebatch, values_of
from facm_platform.progress import time_left

# Relative to the deviation: no rounding of float64 comes near it, and no training would notice it.
TOLERANCE = 1e-6

# Of a file, and of rows in memory, that a thread holds at once.
_PIECE_BYTES = 8 << 20

_BINS, _BAR, _EXAMPLES = 20, 40, 3
_WRAPPED = textwrap.TextWrapper(
    96, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False
)
_IMPORT = "facm-platform import"
_REMEDY = "Restore {}, or make the set again with overwrite=true."

T = TypeVar("T")


def inspect(uri: str) -> JobResult:
    """Print what the set holds: sizes, format, normalisation, origin, and rows per class.

    Raises:
        InvalidInputError: there is no such set, or a part is damaged.
    """
    uri, manifest = _load(uri)
    metrics = _sizes(manifest) | {"quarantined": float(len(manifest.quarantined))}
    lines = [f"latent set {uri}"]
    for title, text in _summary(manifest):
        lines += _WRAPPED.wrap(f"  {title:<14}{text}")
    if manifest.num_classes:
        rows = _rows_per_class(uri, manifest)
        lines += _chart(rows, manifest.class_names)
        metrics["classes_without_rows"] = float(np.count_nonzero(rows == 0))
    print("\n".join(lines), flush=True)
    return _result("inspect", uri, metrics)


def verify(uri: str) -> JobResult:
    """Compare size, hash and Parquet footer of every part with the manifest.

    Raises:
        InvalidInputError: there is no such set, or its store does not answer.
        Refused: parts are not what the manifest says; all of them are listed.
    """
    uri, manifest = _load(uri)
    problems = _each_part("verify", manifest, partial(_problem, uri, manifest.row_format))
    bad = {
        part.name: problem
        for part, problem in zip(manifest.parts, problems, strict=True)
        if problem is not None
    }
    result = _result("verify", uri, _sizes(manifest) | {"bad_parts": float(len(bad))})
    if bad:
        raise Refused(
            f"{uri}: bad parts, {len(bad):,} of {len(problems):,}\n"
            + "".join(f"  {name}: {problem}\n" for name, problem in bad.items())
            + _REMEDY.format("these files"),
            result,
        )
    print(f"{_counted(len(problems), 'part')}: every byte is what the manifest says", flush=True)
    return result


def check_small_set(uri: str, manifest: LatentManifest, field: str) -> None:
    """Look at every byte, before a job starts, of a set that is read within seconds.

    Of a larger one, damage is found where it is read, or by `verify`.

    Raises:
        InvalidInputError: a part is not what the manifest says.
    """
    if sum(part.bytes for part in manifest.parts) > storage.SMALL_BYTES:
        return
    for part in manifest.parts:
        problem = _problem(uri, manifest.row_format, part)
        remedy = "Restore it, or make the set again with overwrite=true"
        require(problem is None, field, uri, f"{part.name}: {problem}", remedy)


def stats(uri: str) -> JobResult:
    """Recompute mean and deviation of every channel and compare them with the manifest's.

    Rows with values that are not finite are counted and left out.

    Raises:
        InvalidInputError: there is no such set, a part is damaged, or a channel is constant.
        Refused: the manifest's statistics would normalise wrongly, unless they were given
            (published, or of the autoencoder or teacher); or values are not finite.
    """
    uri, manifest = _load(uri)
    seen = _Seen.nothing(manifest.row_format)
    for of_part in _each_part("stats", manifest, partial(_seen_in, uri, manifest.row_format)):
        seen = seen.merge(of_part)
    mean, std = seen.statistics.mean, seen.statistics.std()
    off = np.maximum(np.abs(manifest.mean - mean), np.abs(manifest.std - std)) / std
    print(_table(manifest, mean, std, off))
    print(_ranges(seen, manifest.moments), flush=True)
    metrics = {"max_relative_difference": float(off.max()), "non_finite": float(seen.non_finite)}
    result = _result("stats", uri, metrics)
    if seen.non_finite:
        raise Refused(
            f"{seen.non_finite:,} values of {uri} are not finite, which would spoil training. "
            + _REMEDY.format("its parts"),
            result,
        )
    if not off.max() <= TOLERANCE:
        problem = f"the statistics in the manifest are off by {off.max():.3g} of a deviation"
        if not (manifest.created_by.startswith(_IMPORT) or manifest.created_by.endswith(GIVEN)):
            raise Refused(
                f"{problem}: {uri} would be normalised wrongly. " + _REMEDY.format("the manifest"),
                result,
            )
        print(f"note: {problem}; they were given, and not taken from its rows", flush=True)
    return result


def _load(uri: str) -> tuple[str, LatentManifest]:
    uri = storage.absolute(uri)
    return uri, LatentManifest.load(uri, "uri")


def _result(command: str, uri: str, metrics: dict[str, float]) -> JobResult:
    return JobResult(run_id=None, run_name=f"latents {command}", artifact_uri=uri, metrics=metrics)


def _sizes(manifest: LatentManifest) -> dict[str, float]:
    return {
        "parts": float(len(manifest.parts)),
        "rows": float(manifest.rows),
        "bytes": float(sum(part.bytes for part in manifest.parts)),
    }


def _each_part(command: str, manifest: LatentManifest, work: Callable[[Part], T]) -> list[T]:
    """What `work` makes of each part, in their order; prints a line every 5 % of the rows."""
    results: list[T] = []
    started, rows, read_bytes = time.monotonic(), 0, 0
    with ThreadPoolExecutor() as pool:
        for part, result in zip(manifest.parts, pool.map(work, manifest.parts), strict=True):
            results.append(result)
            before, rows = 20 * rows // manifest.rows, rows + part.rows
            read_bytes += part.bytes
            if 20 * rows // manifest.rows > before:
                seconds = time.monotonic() - started
                print(
                    f"latents {command} {rows / manifest.rows:4.0%}  "
                    f"{len(results):,}/{len(manifest.parts):,} parts  {_megabytes(read_bytes)}  "
                    f"{_megabytes(read_bytes / seconds)}/s  "
                    f"{time_left(rows, manifest.rows, rows / seconds)}",
                    flush=True,
                )
    return results


# --- parts --------------------------------------------------------------------------------------


@contextmanager
def _opened(uri: str, format: RowFormat, part: Part) -> Iterator[pq.ParquetFile]:
    """The part, its footer checked.

    Raises:
        InvalidInputError: a part that is missing, damaged or not what the manifest says.
    """
    address = storage.join(uri, part.name)
    with opened_part(address) as file:
        if problem := _footer_problem(file, format, part):
            raise bad_part(address, problem)
        yield file


def _footer_problem(file: pq.ParquetFile, format: RowFormat, part: Part) -> str | None:
    footer = file.metadata
    rows = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    if rows != list(part.row_groups):
        return f"its row groups have {rows} rows, not {list(part.row_groups)}"
    if not file.schema_arrow.equals(format.schema):
        return f"its columns are {_columns(file.schema_arrow)}, not {_columns(format.schema)}"
    return None


def _columns(schema: pa.Schema) -> str:
    return ", ".join(
        f"{field.name}: {field.type}" + " or null" * field.nullable for field in schema
    )


def _problem(uri: str, format: RowFormat, part: Part) -> str | None:
    """What is wrong with a part; None for nothing. A store that fails is not the part's fault."""
    address = storage.join(uri, part.name)
    try:
        with storage.explained(address):
            size, sha256 = _hashed(address)
    except OSError as error:
        return f"it cannot be read ({first_line(error)})"
    if size != part.bytes:
        return f"it has {size} bytes, not {part.bytes}"
    if sha256 != part.sha256:
        return f"its sha256 is {sha256}, not {part.sha256}"
    try:
        with _opened(uri, format, part):
            return None
    except InvalidInputError as error:
        return error.problem


def _hashed(uri: str) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, a piece at a time."""
    store, path = storage.filesystem(uri)
    size, digest = 0, hashlib.sha256()
    with store.open_input_stream(path, compression=None) as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            digest.update(piece)
    return size, digest.hexdigest()


# --- inspect ------------------------------------------------------------------------------------


def _summary(manifest: LatentManifest) -> Iterator[tuple[str, str]]:
    parts = manifest.parts
    groups = [rows for part in parts for rows in part.row_groups]
    total = sum(part.bytes for part in parts)
    yield "rows", f"{manifest.rows:,} in {_counted(len(parts), 'part')}"
    yield "bytes", f"{_megabytes(total)}, {_megabytes(total / len(parts))} a part"
    sizes = " to ".join(f"{rows:,}" for rows in sorted({min(groups), max(groups)}))
    yield "row groups", f"{len(groups):,} of {sizes} rows"
    stored = ", mean and log-variance" * manifest.moments + ", and mirrored" * manifest.flip
    yield "latents", f"{manifest.latent_shape} {manifest.latent_dtype}{stored}"
    if manifest.num_classes:
        names = ": " * bool(manifest.class_names) + _listed(manifest.class_names)
        yield "conditioning", f"{_counted(manifest.num_classes, 'label')}{names}"
    else:
        yield "conditioning", f"text {manifest.text_shape} {manifest.text_dtype}"
    yield "mean", " ".join(f"{value:.4g}" for value in manifest.mean)
    yield "std", " ".join(f"{value:.4g}" for value in manifest.std)
    yield "autoencoder", f"{manifest.autoencoder_id}, sha256 {manifest.autoencoder_sha256[:12]}..."
    yield "manifest", f"sha256 {manifest.sha256}"
    yield "created by", manifest.created_by
    reasons = [f"{entry.key} ({entry.reason})" for entry in manifest.quarantined]
    yield "quarantined", f"{len(reasons):,}" + ": " * bool(reasons) + _listed(reasons)


def _rows_per_class(uri: str, manifest: LatentManifest) -> NDArray[np.int64]:
    """How many rows have each label; reads nothing but the labels."""
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(partial(_label_counts, uri, manifest.row_format), manifest.parts))
    total: NDArray[np.int64] = np.sum(counts, axis=0)
    return total


def _label_counts(uri: str, format: RowFormat, part: Part) -> NDArray[np.int64]:
    with _opened(uri, format, part) as file:
        labels = values_of(file.read([LABEL]), LABEL)
    if labels.min() < 0 or labels.max() >= format.num_classes:
        address = storage.join(uri, part.name)
        raise bad_part(address, f"it has labels outside of [0, {format.num_classes})")
    return np.bincount(labels, minlength=format.num_classes)


def _chart(rows: NDArray[np.int64], names: Sequence[str]) -> list[str]:
    """Rows per class in figures and as bars, one for each class or for ranges of equal size."""
    without = [str(label) for label in np.flatnonzero(rows == 0)]
    lines = [
        f"rows a class: min {rows.min():,}, median {_short(np.median(rows))}, max {rows.max():,}; "
        f"{len(without):,} without any" + ": " * bool(without) + _listed(without)
    ]
    ranges = np.array_split(np.arange(len(rows)), min(_BINS, len(rows)))
    titles = [
        f"{labels[0]}-{labels[-1]}"
        if len(labels) > 1
        else " ".join([str(labels[0]), *names[labels[0] : labels[0] + 1]])
        for labels in ranges
    ]
    means = [rows[labels].mean() for labels in ranges]
    if len(rows) > _BINS:
        lines.append("mean over ranges of classes:")
    wide, figures = max(map(len, titles)), max(len(_short(mean)) for mean in means)
    for title, mean in zip(titles, means, strict=True):
        bar = "#" * round(_BAR * mean / max(means))
        lines.append(f"  {title:<{wide}}  {_short(mean):>{figures}}  {bar}".rstrip())
    return lines


def _listed(texts: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(texts[:_EXAMPLES]) + ", ..." * (len(texts) > _EXAMPLES)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _short(value: Any) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


# --- stats --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Seen:
    """Statistics and range of each stored channel over the finite rows; values that are not."""

    statistics: ChannelStatistics
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    non_finite: int

    @staticmethod
    def nothing(format: RowFormat) -> _Seen:
        channels = format.latent_shape[0]
        bound = np.full(channels * (2 if format.moments else 1), np.inf)
        return _Seen(ChannelStatistics.empty(channels), bound, -bound, 0)

    @staticmethod
    def of(latents: NDArray[Any], format: RowFormat) -> _Seen:
        finite = np.isfinite(latents)
        rows = finite.all(axis=(1, 2, 3))
        non_finite = int(finite.size - np.count_nonzero(finite))
        if not rows.all():
            latents = latents[rows]
        if not len(latents):
            return dataclasses.replace(_Seen.nothing(format), non_finite=non_finite)
        return _Seen(
            ChannelStatistics.of(latents, format.moments),
            latents.min(axis=(0, 2, 3)).astype(np.float64),
            latents.max(axis=(0, 2, 3)).astype(np.float64),
            non_finite,
        )

    def merge(self, other: _Seen) -> _Seen:
        return _Seen(
            self.statistics.merge(other.statistics),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.non_finite + other.non_finite,
        )


def _seen_in(uri: str, format: RowFormat, part: Part) -> _Seen:
    seen = _Seen.nothing(format)
    columns = list(format.latent_columns)
    with _opened(uri, format, part) as file:
        groups = (file.read_row_group(index, columns) for index in range(file.num_row_groups))
        for table in rebatch(groups, repeat(max(1, _PIECE_BYTES // format.row_bytes))):
            for column in columns:
                seen = seen.merge(_Seen.of(values_of(table, column), format))
    return seen


def _table(
    manifest: LatentManifest,
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    off: NDArray[np.float64],
) -> str:
    titles = ("mean", "std", "manifest mean", "manifest std", "difference")
    lines = ["channel" + "".join(f"{title:>15}" for title in titles)]
    for channel, values in enumerate(zip(mean, std, manifest.mean, manifest.std, strict=True)):
        numbers = "".join(f"{value:>15.7g}" for value in values)
        lines.append(f"{channel:>7}{numbers}{off[channel]:>15.2g}")
    return "\n".join(lines)


def _ranges(seen: _Seen, moments: bool) -> str:
    titles = ("means", "log-variances") if moments else ("values",)
    lows, highs = (np.split(bound, len(titles)) for bound in (seen.minimum, seen.maximum))
    ranges = [
        f"{title} in [{low.min():.6g}, {high.max():.6g}]"
        for title, low, high in zip(titles, lows, highs, strict=True)
    ]
    return f"{', '.join(ranges)}; {seen.non_finite:,} not finite"
