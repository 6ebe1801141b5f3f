"""Metrics on their way to MLflow: training never waits for the server nor stops with it."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Metric

from facm_platform.tracking.store import new_client

logger = logging.getLogger(__name__)

_METRICS_PER_CALL = 1000
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0


@dataclass(frozen=True)
class Point:
    """One number of one run; delivering it twice leaves one in MLflow."""

    run_id: str
    key: str
    value: float
    timestamp_milliseconds: int
    images_seen: int


class MetricSender:
    """Delivers the metrics of a run from a background thread.

    While the server is away the points are kept in memory and in `spool`, and tried again with
    growing pauses. A spool left by an earlier process is delivered first.

    Args:
        uri: Tracking URI, `Store.uri`.
        run_id: The run.
        spool: JSON-lines file, one per run, on a disk that outlives the process.
    """

    def __init__(self, uri: str, run_id: str, spool: Path) -> None:
        self._client = new_client(uri)
        self._run_id = run_id
        self._spool = spool
        self._arrivals: queue.SimpleQueue[Point] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._pending: list[Point] = _read(spool)
        self._failure: Exception | None = None
        self._wake, self._closing, self._given_up = (threading.Event() for _ in range(3))
        if self._pending:
            self._wake.set()
        # Daemon: a server that hangs must not keep the process alive after `close` gave up.
        self._thread = threading.Thread(target=self._work, name="metric-sender", daemon=True)
        self._thread.start()

    def send(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Hand over numbers; returns at once."""
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            self._arrivals.put(Point(self._run_id, key, float(value), now, images_seen))
        self._wake.set()

    def close(self, timeout_seconds: float = 30.0) -> int:
        """Deliver what is left, trying for at most `timeout_seconds`.

        Returns:
            Number of points that were not delivered: they lie in the spool, for the next start.
        """
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_seconds)
        self._given_up.set()
        with self._lock:
            self._collect()
            left = len(self._pending)
            if left:
                _write(self._spool, self._pending)
                reason = self._failure or "the server did not answer in time"
                told = (left, self._run_id, reason, self._spool)
                logger.error("%d metrics of run %s were not delivered (%s); kept in %s", *told)
        return left

    def _work(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._given_up.is_set():
            if self._failure is None:
                self._wake.wait()
            elif self._closing.is_set():
                self._given_up.wait(_FIRST_PAUSE_SECONDS)
            else:
                self._closing.wait(pause)
            self._wake.clear()
            # Read before collecting: whatever was sent before `close` is then in this round.
            last_round = self._closing.is_set()
            with self._lock:
                self._collect()
                points = list(self._pending)
            if not self._deliver(points):
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            pause = _FIRST_PAUSE_SECONDS
            if last_round:
                return

    def _deliver(self, points: Sequence[Point]) -> bool:
        try:
            self._log(points)
        # Whatever it was, this thread must live on: it is told, tried again, and told by `close`.
        except Exception as error:
            if self._failure is None:
                logger.warning("tracking is away (%s); metrics kept in %s", error, self._spool)
            self._failure = error
            with self._lock:
                _write(self._spool, self._pending)
            return False
        if self._failure is not None:
            logger.warning("tracking is back; %d metrics delivered", len(points))
            self._failure = None
        with self._lock:
            del self._pending[: len(points)]
            # Only an answer that came after `close` gave up leaves something here.
            if not self._pending:
                self._spool.unlink(missing_ok=True)
        return True

    def _log(self, points: Sequence[Point]) -> None:
        for run_id in dict.fromkeys(point.run_id for point in points):
            metrics = [
                Metric(point.key, point.value, point.timestamp_milliseconds, point.images_seen)
                for point in points
                if point.run_id == run_id
            ]
            for start in range(0, len(metrics), _METRICS_PER_CALL):
                self._client.log_batch(run_id, metrics=metrics[start : start + _METRICS_PER_CALL])

    def _collect(self) -> None:
        while not self._arrivals.empty():
            self._pending.append(self._arrivals.get())


def _read(spool: Path) -> list[Point]:
    if not spool.is_file():
        return []
    return [Point(**json.loads(line)) for line in spool.read_text().splitlines()]


def _write(spool: Path, points: Sequence[Point]) -> None:
    """Replace the spool: a killed process leaves the old file or the new one, never half of one."""
    spool.parent.mkdir(parents=True, exist_ok=True)
    part = spool.with_name(spool.name + ".part")
    part.write_text("".join(json.dumps(dataclasses.asdict(point)) + "\n" for point in points))
    part.replace(spool)
