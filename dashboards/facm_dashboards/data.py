"""What the pages show, read once for all of them and again when it has changed."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from mlflow.tracking import MlflowClient

from facm_dashboards.config import BoardConfig
from facm_dashboards.identity import asks_for_login, visitor
from facm_platform.registry.versions import Version, list_models, list_versions
from facm_platform.search.findings import Findings
from facm_platform.search.published import read_findings
from facm_platform.tracking import new_client
from facm_platform.tracking.reading import (
    Curve,
    RunRecord,
    list_artifacts,
    read_artifact,
    read_curves,
    read_runs,
)

T = TypeVar("T")

FRESH_SECONDS = 3.0
"""What was read less long ago is shown as it is."""
_STALE_SECONDS = 600.0
_PAUSE = 10.0
_CURVES = 40_000
_FILES = 64
_VISITORS = 32
_SEARCHES = 16


@dataclass(frozen=True)
class Snapshot:
    """All runs at one time.

    Attributes:
        runs: The latest first.
        read_at: Seconds since 1970.
        took: Seconds that reading them took.
        failure: Why they are not newer; None if they are as new as can be.
    """

    runs: Sequence[RunRecord]
    read_at: float
    took: float
    failure: str | None = None

    def run(self, run_id: str) -> RunRecord | None:
        """The one of that id."""
        return next((run for run in self.runs if run.run_id == run_id), None)


@dataclass(frozen=True)
class Registry:
    """All registered models at one time.

    Attributes:
        models: Name -> alias -> number.
        versions: Of all of them, the latest of each first.
        read_at: Seconds since 1970.
    """

    models: Mapping[str, Mapping[str, str]]
    versions: Sequence[Version]
    read_at: float

    def of(self, model: str) -> list[Version]:
        """Versions of one model."""
        return [version for version in self.versions if version.model == model]


class Kept(Generic[T]):
    """At most so many things, those used last.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._things: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            if key in self._things:
                self._things.move_to_end(key)
            return self._things.get(key)

    def put(self, key: Hashable, thing: T) -> T:
        with self._lock:
            self._things[key] = thing
            self._things.move_to_end(key)
            while len(self._things) > self._size:
                self._things.popitem(last=False)
        return thing

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._things.pop(key, None)

    def get_or(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing, made now if need be."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found


class Data:
    """MLflow, as the visitor of the request sees it; every key has their login in it.

    Args:
        config: Which MLflow.
    """

    def __init__(self, config: BoardConfig) -> None:
        self.config = config
        self._experiment = config.tracking.experiment
        self._snapshots: Kept[Snapshot] = Kept(_VISITORS)
        self._curves: Kept[Curve] = Kept(_CURVES)
        self._files: Kept[bytes] = Kept(_FILES)
        self._findings: Kept[Findings] = Kept(_SEARCHES)
        self._registries: Kept[Registry] = Kept(_VISITORS)
        self._refreshing: set[str] = set()
        self._lock = threading.Lock()

    @property
    def client(self) -> MlflowClient:
        """A client of the store; the visitor's login goes with it."""
        return new_client(self.config.tracking_uri)

    def snapshot(self) -> Snapshot:
        """The runs, a few seconds old at most; older ones only while the store does not answer.

        Raises:
            MlflowException: the store does not answer, and nothing of it is known yet.
        """
        key = visitor.get().key
        known = self._snapshots.get(key)
        if known is None:
            return self._read(key)
        age = time.time() - known.read_at
        if age > _STALE_SECONDS and known.failure is None:
            return self._read_again(key, known)
        # Of a large store, or one that is slow: it is not asked all the time.
        if age > max(FRESH_SECONDS, _PAUSE * known.took):
            self._refresh(key, known)
        return known

    def read_ahead(self) -> None:
        """Begin to read the runs, where MLflow asks for no login: the first visitor need not wait.

        Whatever fails is told to that visitor.
        """

        def work() -> None:
            with suppress(Exception):
                self.snapshot()

        threading.Thread(target=work, daemon=True).start()

    def curves(
        self, runs: Sequence[RunRecord], metrics: Sequence[str]
    ) -> dict[str, list[Curve | None]]:
        """The runs' curves by metric, in their order; one that has grown is read again."""
        who = visitor.get().key
        found: dict[tuple[str, str], Curve] = {}
        missing: dict[str, list[RunRecord]] = {}
        for metric in metrics:
            for run in (run for run in runs if metric in run.metrics):
                curve = self._curves.get((who, run.run_id, metric, run.metrics[metric]))
                if curve is None:
                    missing.setdefault(metric, []).append(run)
                else:
                    found[run.run_id, metric] = curve
        read = self._read_curves(missing)
        for (run_id, metric), curve in read.items():
            run = next(run for run in runs if run.run_id == run_id)
            self._curves.put((who, run_id, metric, run.metrics[metric]), curve)
        found |= read
        return {metric: [found.get((run.run_id, metric)) for run in runs] for metric in metrics}

    def findings(self, search: RunRecord) -> Findings:
        """What a search has found; read again while it goes on.

        Raises:
            FileNotFoundError: it has left no records.
        """
        if search.ended is None:
            return read_findings(self.client, search.run_id)
        key = (visitor.get().key, search.run_id, search.ended)
        return self._findings.get_or(key, lambda: read_findings(self.client, search.run_id))

    def registry(self, *, fresh: bool = False) -> Registry:
        """The models, a few seconds old at most.

        Args:
            fresh: Not even that: something was changed.
        """
        key = visitor.get().key
        known = self._registries.get(key)
        if fresh or known is None or time.time() - known.read_at > FRESH_SECONDS:
            models, versions = list_models(self.client), list_versions(self.client)
            known = self._registries.put(key, Registry(models, versions, time.time()))
        return known

    def files(self, run_id: str, folder: str) -> dict[str, int]:
        """Names and sizes of a run's files in a folder."""
        return list_artifacts(self.client, run_id, folder)

    def file(self, run: RunRecord, path: str, most_bytes: int) -> bytes:
        """One file of a run; of one that has ended, the same for ever.

        Raises:
            FileNotFoundError: there is none of that name, or it is too large.
        """
        key = (visitor.get().key, run.run_id, run.status, run.ended, path)
        return self._files.get_or(
            key, lambda: read_artifact(self.client, run.run_id, path, most_bytes)
        )

    def _read_curves(self, missing: dict[str, list[RunRecord]]) -> dict[tuple[str, str], Curve]:
        """In one go for all metrics that the same runs lack."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for metric, runs in missing.items():
            alike.setdefault(tuple(run.run_id for run in runs), []).append(metric)
        read: dict[tuple[str, str], Curve] = {}
        for ids, metrics in alike.items():
            read |= read_curves(self.client, ids, metrics)
        return read

    def _read(self, key: str) -> Snapshot:
        start = time.time()
        runs = read_runs(self.client, self._experiment)
        now = time.time()
        return self._snapshots.put(key, Snapshot(runs, now, now - start))

    def _read_again(self, key: str, known: Snapshot) -> Snapshot:
        """What is new, or what is known with the reason why there is nothing newer."""
        try:
            return self._read(key)
        # Shown on the pages, whatever it was.
        except Exception as error:
            if asks_for_login(error):
                self._snapshots.drop(key)
                raise
            told = str(error).splitlines()[0][:300]
            return self._snapshots.put(key, replace(known, failure=told))

    def _refresh(self, key: str, known: Snapshot) -> None:
        """Beside the request, which shows what is known."""
        with self._lock:
            if key in self._refreshing:
                return
            self._refreshing.add(key)

        def work() -> None:
            try:
                self._read_again(key, known)
            finally:
                with self._lock:
                    self._refreshing.discard(key)

        context = copy_context()
        threading.Thread(target=context.run, args=(work,), daemon=True).start()
