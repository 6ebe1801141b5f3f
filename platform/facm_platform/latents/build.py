"""A latent set, made part by part on a cluster: what is done stays done, and all appears at once.

Beside the parts lies a folder ``_progress`` until the manifest is written:

- ``set.json``: which set this is going to be; made first, and only if there is none.
- ``piece-00000.json``: the inputs of each part; and ``pieces.json``, how many, once all are listed.
- ``part-00000.json``: what came of a part, once it is there. With the first part comes the null
  prompt, of a set with texts.

So whoever continues does the same work on the same inputs, and nothing twice.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.config.sections import RunConfig
from facm_platform.latents._ray_data import ordered_and_quiet
from facm_platform.latents.manifest import (
    GIVEN,
    MANIFEST,
    LatentManifest,
    Part,
    Quarantined,
    is_part,
    part_name,
)
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from facm_platform.progress import time_left
from facm_platform.tracking import connect_store, embedded_root, open_run

PROGRESS = "_progress"
_SET, _PIECES = "set.json", "pieces.json"

_TAKEN = "another latent set (from another source, or made in another way) {}"
# Published statistics are taken over some thousands of rows.
_GIVEN_SHIFT, _GIVEN_SCALE = 0.1, 1.1

_ANOTHER = "Choose another folder, or give overwrite=true"

Floats = tuple[float, ...]

Piece = dict[str, Any]
"""The inputs of one part, as JSON."""


class RowReader(Protocol):
    """Makes rows out of inputs; lives in a worker process."""

    def rows(self, piece: Piece) -> Iterator[pa.Table | Quarantined]:
        """The rows of a piece, in tables of any size, and the inputs that give none."""

    def null_text(self) -> NullText | None:
        """The null prompt; None where it is not known, or rows have labels."""


@dataclass(frozen=True, kw_only=True)
class BuildersConfig:
    """The workers that make parts.

    Attributes:
        count: At most so many; 0 takes all the cluster has.
        cpus: CPUs of each; images are decoded in so many threads.
        gpu: Whether each takes a GPU.
    """

    count: int = 0
    cpus: int = 1
    gpu: bool = False

    def __post_init__(self) -> None:
        require(self.count >= 0, "count", self.count, "negative", "Give 0 to use all there are")
        require(self.cpus > 0, "cpus", self.cpus, "not positive", "Give at least 1")


@dataclass(frozen=True, kw_only=True)
class SetBuild:
    """A set to be.

    Attributes:
        uri: Where, absolute.
        format: Its columns.
        sha256: Hash of all that determines its contents.
        pieces: Lists the inputs, part by part; called in the driver, unless it was done before.
        reader: Makes the reader of a worker process.
        workers: How many, and what each takes.
        manifest: Fields of the manifest that do not come from the rows.
        normalisation: Mean and standard deviation to use instead of those of the rows.
        is_of_rows: Whether `normalisation` was taken over such rows, and is refused if it is far
            from theirs.
        max_quarantined: Share of the inputs that may be unreadable.
        overwrite: Replace another set that lies there, finished or not.
    """

    uri: str
    format: RowFormat
    sha256: str
    pieces: Callable[[], Iterator[Piece]]
    reader: Callable[[], RowReader]
    workers: BuildersConfig
    manifest: dict[str, Any]
    normalisation: tuple[Floats, Floats] | None = None
    is_of_rows: bool = False
    max_quarantined: float
    overwrite: bool

    def finished(self) -> LatentManifest | None:
        """The manifest of this set if it is there already.

        Raises:
            InvalidInputError: the place cannot be reached, or is taken by something else that is
                not to be replaced.
        """
        storage.check_reachable(self.uri, "output_uri")
        names = storage.list_files(self.uri)
        if MANIFEST not in names:
            self._check_free(names)
            return None
        try:
            manifest = LatentManifest.load(self.uri, "output_uri")
        except InvalidInputError:
            # Damaged, and to be replaced anyway.
            if self.overwrite:
                return None
            raise
        if manifest.encoding_sha256 == self.sha256:
            return manifest
        require(self.overwrite, "output_uri", self.uri, _TAKEN.format("lies there"), _ANOTHER)
        return None

    def run(self, job: str) -> LatentManifest:
        """Make what is missing, and commit. Prints one line for each part.

        Raises:
            InvalidInputError: too many inputs are unreadable, a row would spoil training, or
                another set is being made, or was made, in the same place.
        """
        self._claim()
        count = self._listed()
        done = storage.list_files(self._progress())
        todo = [index for index in range(count) if _result_name(index) not in done]
        if len(todo) < count:
            print(f"{job}: {count - len(todo)} of {count} parts are there already", flush=True)
        if todo:
            with connected():
                self._make(job, todo, count)
        manifest = self._manifest(count)
        self._commit(manifest)
        return manifest

    def _claim(self) -> None:
        """Say which set is being made here; another one that may be replaced goes first."""
        if self.overwrite and self._claimed() != self._claim_text:
            _clear(self.uri)
        if self._claimed() is None and not storage.exists(storage.join(self.uri, MANIFEST)):
            # Of a set that is not there any more; nobody makes another one yet.
            storage.delete_file(storage.join(self.uri, NULL_TEXT))
        try:
            storage.create_bytes(self._progress(_SET), self._claim_text)
        except FileExistsError:
            self._check_claim()
        # Finished by another program since `finished` looked: its parts are not to be touched.
        if storage.exists(storage.join(self.uri, MANIFEST)):
            storage.delete_file(self._progress(_SET))
            raise InvalidInputError(
                "output_uri", self.uri, _TAKEN.format("lies there by now"), _ANOTHER
            )

    def _check_free(self, names: Iterable[str]) -> None:
        """Nothing lies there but what a build of this set, or a replaceable one, has left."""
        ours = (f"{PROGRESS}/", ".")
        known = (name for name in names if is_part(name) or name == NULL_TEXT)
        foreign = sorted(n for n in set(names).difference(known) if not n.startswith(ours))
        require(
            not foreign,
            "output_uri",
            self.uri,
            f"the folder holds files of something else ({', '.join(foreign[:3])})",
            "Choose an empty folder",
        )
        self._check_claim()

    def _check_claim(self) -> None:
        free = self.overwrite or self._claimed() in (None, self._claim_text)
        require(free, "output_uri", self.uri, _TAKEN.format("is being made there"), _ANOTHER)

    def _claimed(self) -> bytes | None:
        try:
            return storage.read_bytes(self._progress(_SET))
        except FileNotFoundError:
            return None

    @property
    def _claim_text(self) -> bytes:
        return json.dumps({"encoding_sha256": self.sha256}).encode()

    def _listed(self) -> int:
        """How many parts there will be."""
        try:
            return int(json.loads(storage.read_bytes(self._progress(_PIECES)))["count"])
        except FileNotFoundError:
            pass
        count = 0
        for piece in self.pieces():
            storage.write_bytes(self._progress(_piece_name(count)), json.dumps(piece).encode())
            count += 1
        storage.write_bytes(self._progress(_PIECES), json.dumps({"count": count}).encode())
        return count

    def _make(self, job: str, todo: list[int], count: int) -> None:
        workers = self.workers
        dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            cast(Any, _PartMaker),  # typed for functions only
            fn_constructor_args=(self.uri, self.format, self.reader),
            compute=ActorPoolStrategy(min_size=1, max_size=workers.count or len(todo)),
            num_cpus=workers.cpus,
            num_gpus=1 if workers.gpu else None,
        )
        started, rows, quarantined = time.monotonic(), 0, 0
        for done, made in enumerate(ordered_and_quiet(dataset).iter_rows(), start=1):
            rows, quarantined = rows + made["rows"], quarantined + made["quarantined"]
            seconds = time.monotonic() - started
            finished = count - len(todo) + done
            print(
                f"{job} {finished / count:4.0%}  {finished:,}/{count:,} parts  {rows:,} rows  "
                f"{quarantined:,} quarantined  {rows / seconds:,.0f} rows/s  "
                f"{time_left(done, len(todo), done / seconds)}",
                flush=True,
            )

    def _manifest(self, count: int) -> LatentManifest:
        results = [_read_result(self._progress(_result_name(index))) for index in range(count)]
        made = [(part, statistics) for part, statistics, _ in results if part is not None]
        quarantined = [entry for _, _, entries in results for entry in entries]
        self._check_quarantine(sum(part.rows for part, _ in made), quarantined)
        fields: dict[str, Any] = self.manifest | {
            "encoding_sha256": self.sha256,
            "quarantined": tuple(quarantined),
        }
        if self.normalisation is not None:
            mean, std = self.normalisation
            if self.is_of_rows:
                _check_given(mean, std, LatentManifest.of(self.format, made, **fields))
            else:
                fields["created_by"] += GIVEN
            fields |= {"mean": mean, "std": std}
        return LatentManifest.of(self.format, made, **fields)

    def _check_quarantine(self, rows: int, quarantined: list[Quarantined]) -> None:
        inputs = rows + len(quarantined)
        examples = "; ".join(f"{entry.key}: {entry.reason}" for entry in quarantined[:3])
        require(
            len(quarantined) <= self.max_quarantined * inputs,
            "max_quarantined",
            self.max_quarantined,
            f"{len(quarantined)} of {inputs} inputs could not be read ({examples})",
            "Mend the inputs, or allow a larger share: what is done is kept",
        )

    def _commit(self, manifest: LatentManifest) -> None:
        kept = {part.name for part in manifest.parts}
        for stray in storage.list_files(self.uri).keys() - kept:
            if is_part(stray):
                storage.delete_file(storage.join(self.uri, stray))
        try:
            manifest.save(self.uri)
        except FileExistsError:
            require(
                LatentManifest.load(self.uri, "output_uri") == manifest,
                "output_uri",
                self.uri,
                _TAKEN.format("lies there by now"),
                _ANOTHER,
            )
        _clear_progress(self.uri)

    def _progress(self, *names: str) -> str:
        return storage.join(self.uri, PROGRESS, *names)


def _clear(uri: str) -> None:
    """Take away a set, and what was left of one that was being made.

    The manifest goes first: from then on there is no set, rather than half of one.
    """
    storage.delete_file(storage.join(uri, MANIFEST))
    storage.delete_file(storage.join(uri, NULL_TEXT))
    for name in filter(is_part, storage.list_files(uri)):
        storage.delete_file(storage.join(uri, name))
    _clear_progress(uri)


def _clear_progress(uri: str) -> None:
    # The claim last, as long as there is anything to continue.
    folder = storage.join(uri, PROGRESS)
    for name in sorted(storage.list_files(folder), key=lambda name: name == _SET):
        storage.delete_file(storage.join(folder, name))


def _check_given(mean: Floats, std: Floats, computed: LatentManifest) -> None:
    """Given statistics may be those of a sample of the rows, but not of other rows."""
    shift = np.abs(np.subtract(mean, computed.mean) / computed.std).max()
    scale = np.exp(np.abs(np.log(np.divide(std, computed.std))).max())
    require(
        bool(shift < _GIVEN_SHIFT and scale < _GIVEN_SCALE),
        "statistics",
        "given",
        f"they differ from those of the rows by up to {shift:.2f} standard deviations in mean, "
        f"and by a factor of up to {scale:.2f} in scale",
        "Use statistics=computed, or the statistics of these latents",
    )


class _PartMaker:
    """An actor that makes parts."""

    def __init__(self, uri: str, format: RowFormat, reader: Callable[[], RowReader]) -> None:
        self._uri, self._format, self._reader = uri, format, reader()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["item"])
        if index == 0 and (null := self._reader.null_text()) is not None:
            null.save(self._uri)
        folder = storage.join(self._uri, PROGRESS)
        piece = json.loads(storage.read_bytes(storage.join(folder, _piece_name(index))))
        quarantined: list[Quarantined] = []
        tables = self._tables(piece, quarantined)
        first = next(tables, None)
        part, statistics = None, ChannelStatistics.empty(self._format.latent_shape[0])
        if first is not None:
            part, statistics = write_part(
                self._uri, part_name(index), _chained(first, tables), self._format
            )
        result = {
            "part": part and dataclasses.asdict(part),
            "count": statistics.count,
            "mean": statistics.mean.tolist(),
            "m2": statistics.m2.tolist(),
            "quarantined": [dataclasses.asdict(entry) for entry in quarantined],
        }
        storage.write_bytes(storage.join(folder, _result_name(index)), json.dumps(result).encode())
        return {"rows": part.rows if part else 0, "quarantined": len(quarantined)}

    def _tables(self, piece: Piece, quarantined: list[Quarantined]) -> Iterator[pa.Table]:
        for item in self._reader.rows(piece):
            if isinstance(item, Quarantined):
                quarantined.append(item)
            elif len(item):
                yield item


def _chained(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _read_result(uri: str) -> tuple[Part | None, ChannelStatistics, list[Quarantined]]:
    values = json.loads(storage.read_bytes(uri))
    part = values["part"]
    return (
        part and Part(**part | {"row_groups": tuple(part["row_groups"])}),
        ChannelStatistics(
            count=values["count"], mean=np.array(values["mean"]), m2=np.array(values["m2"])
        ),
        [Quarantined(**entry) for entry in values["quarantined"]],
    )


def _piece_name(index: int) -> str:
    return f"piece-{index:05d}.json"


def _result_name(index: int) -> str:
    return f"part-{index:05d}.json"


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """A validated job that makes a set.

    Attributes:
        job: Its name.
        config: Its configuration.
        run: Name and tracking of its run.
        build: The set to be.
        what: What goes into it, in a few words.
        made: The set, if it is there already.
        made_from: Further lineage tags of the run.
    """

    job: str
    config: Any
    run: RunConfig
    build: SetBuild
    what: str
    made: LatentManifest | None
    made_from: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """What `execute` would do, in a line."""
        if self.made is not None:
            return f"{self.build.uri} holds this latent set already: nothing to do"
        format = self.build.format
        return (
            f"{self.job} {self.what} to latents {format.latent_shape} {format.latent_dtype} at "
            f"{self.build.uri}"
        )

    def execute(self) -> JobResult:
        """Make the set, unless it is there already; either way under an MLflow run."""
        print(self.describe(), flush=True)
        store = connect_store(self.run.tracking, embedded_root(self.run.storage_uri))
        with open_run(
            store, self.run.name, job=self.job, config=self.config, tags=self.made_from
        ) as tracked:
            manifest = self.made or self.build.run(self.job)
            metrics = {
                "rows": float(manifest.rows),
                "parts": float(len(manifest.parts)),
                "quarantined": float(len(manifest.quarantined)),
            }
            tracked.log_metrics(metrics, images_seen=manifest.rows)
            tracked.set_tags({"manifest_sha256": manifest.sha256})
            manifest_uri = storage.join(self.build.uri, MANIFEST)
            tracked.log_text(storage.read_text(manifest_uri), MANIFEST)
        return JobResult(
            run_id=tracked.run_id,
            run_name=self.run.name,
            artifact_uri=self.build.uri,
            metrics=metrics,
        )
