"""Reading runs back: many at once, their whole curves, and their files."""

from __future__ import annotations

import math
import posixpath
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException, get_error_code
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.tracking.dbmodels.models import SqlMetric
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.rest_utils import http_request
from numpy.typing import NDArray

from facm_platform.tracking.run import TAG_PREFIX

ARTIFACT_BYTES = 32 * 2**20
"""A larger file is not read whole."""

_RUNS_PER_CALL = 1000
# What MLflow's bulk endpoint takes and gives at most.
_BULK_RUNS, _BULK_POINTS = 100, 25_000
_BULK = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_PARALLEL = 8


@dataclass(frozen=True, kw_only=True)
class Latest:
    """The last number of a metric.

    Attributes:
        value: It.
        images: The count of images that it is of.
        milliseconds: When it was logged, since 1970.
    """

    value: float
    images: int
    milliseconds: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What MLflow knows of a run, without its curves.

    Attributes:
        run_id: MLflow's.
        name: The user's.
        job: What made it, e.g. ``distill``; empty for a run of something else.
        status: MLflow's: ``RUNNING``, ``FINISHED``, ``FAILED``, ``KILLED``, ``SCHEDULED``.
        started: Milliseconds since 1970.
        ended: The same; None while it runs.
        parent_id: Run of the search that it is a trial of.
        tags: Ours, without their prefix.
        params: Flat configuration.
        metrics: The last number of each.
    """

    run_id: str
    name: str
    job: str
    status: str
    started: int
    ended: int | None
    parent_id: str | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, Latest]

    def value(self, metric: str) -> float | None:
        """The last one; None where it was not measured."""
        latest = self.metrics.get(metric)
        return None if latest is None else latest.value


@dataclass(frozen=True)
class Curve:
    """A metric over training.

    Attributes:
        images: Counts of images, ascending, int64.
        values: As many, float64; where a count was logged twice, the later one.
    """

    images: NDArray[np.int64]
    values: NDArray[np.float64]


def read_runs(client: MlflowClient, experiment: str) -> list[RunRecord]:
    """All runs of an experiment that are not deleted, the latest first; none without it."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs: list[RunRecord] = []
    token: str | None = None
    while token is None or token:
        page = client.search_runs(
            [found.experiment_id],
            max_results=_RUNS_PER_CALL,
            order_by=["attributes.start_time DESC"],
            page_token=token,
        )
        runs += [_record(run) for run in page]
        token = page.token or ""
    return runs


def read_curves(
    client: MlflowClient, run_ids: Sequence[str], metrics: Sequence[str]
) -> dict[tuple[str, str], Curve]:
    """Curves by (run, metric), of those that have one; a call for each metric, not for each run."""
    store: Any = client._tracking_client.store
    if isinstance(store, SqlAlchemyStore):
        found: Iterable[_Point] = _from_database(store, run_ids, metrics)
    else:
        found = _from_server(store, run_ids, metrics)
    points: dict[tuple[str, str], dict[int, float]] = {}
    for run_id, metric, images, value in found:
        points.setdefault((run_id, metric), {})[images] = value
    return {key: _curve(some) for key, some in points.items()}


def list_artifacts(client: MlflowClient, run_id: str, folder: str = "") -> dict[str, int]:
    """Files of a run in `folder`, each with its size in bytes; the names are whole paths."""
    found = client.list_artifacts(run_id, folder or None)
    return {file.path: int(file.file_size or 0) for file in found if not file.is_dir}


def list_folders(client: MlflowClient, run_id: str, folder: str = "") -> list[str]:
    """Folders of a run in `folder`."""
    return [file.path for file in client.list_artifacts(run_id, folder or None) if file.is_dir]


def read_artifact(
    client: MlflowClient, run_id: str, path: str, most_bytes: int = ARTIFACT_BYTES
) -> bytes:
    """One file of a run, only under a name that the store itself lists.

    Raises:
        FileNotFoundError: the run has no such file, or it is larger than `most_bytes`.
    """
    size = list_artifacts(client, run_id, posixpath.dirname(path)).get(path)
    if size is None or size > most_bytes:
        raise FileNotFoundError(f"{path} of run {run_id}")
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        file = Path(folder, "file")
        _download(client._tracking_client._get_artifact_repo(run_id), path, file)
        return file.read_bytes()


def download_folder(repository: ArtifactRepository, folder: Path, path: str = "") -> None:
    """All that lies under `path`, into `folder`."""
    for file in repository.list_artifacts(path or None):
        if file.is_dir:
            download_folder(repository, folder, file.path)
        else:
            _download(repository, file.path, folder / file.path)


def _download(repository: ArtifactRepository, path: str, file: Path) -> None:
    """In this thread: in those of MLflow's own downloads nobody knows whose login is to be used."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cast(Any, repository)._download_file(path, str(file))


def is_missing(error: MlflowException) -> bool:
    """Whether it says that there is no such thing."""
    return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


def _record(run: MlflowRun) -> RunRecord:
    tags = run.data.tags
    own = {k.removeprefix(TAG_PREFIX): v for k, v in tags.items() if k.startswith(TAG_PREFIX)}
    latest = {
        metric.key: Latest(value=metric.value, images=metric.step, milliseconds=metric.timestamp)
        for metric in run.data._metric_objs
    }
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        job=own.get("job", ""),
        status=run.info.status,
        started=run.info.start_time or 0,
        ended=run.info.end_time,
        parent_id=tags.get(MLFLOW_PARENT_RUN_ID),
        tags=own,
        params=run.data.params,
        metrics=latest,
    )


_Point = tuple[str, str, int, float]
"""Run, metric, images, value."""


def _from_database(
    store: SqlAlchemyStore, run_ids: Sequence[str], metrics: Sequence[str]
) -> list[_Point]:
    """All at once, as rows: the objects that MLflow makes of them take five times longer."""
    columns = (SqlMetric.run_uuid, SqlMetric.key, SqlMetric.step, SqlMetric.value, SqlMetric.is_nan)
    with store.ManagedSessionMaker() as session:
        rows = (
            session.query(*columns)
            .filter(SqlMetric.run_uuid.in_(run_ids), SqlMetric.key.in_(metrics))
            .order_by(SqlMetric.timestamp)
            .all()
        )
    return [
        (run, key, step, math.nan if is_nan else value) for run, key, step, value, is_nan in rows
    ]


def _from_server(store: Any, run_ids: Sequence[str], metrics: Sequence[str]) -> list[_Point]:
    """Some metrics at a time."""
    chunks = [run_ids[at : at + _BULK_RUNS] for at in range(0, len(run_ids), _BULK_RUNS)]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        # In a context of each thread's own: it may carry the user's name.
        pending = [
            pool.submit(copy_context().run, partial(_ask_server, store, metric, chunk))
            for metric in metrics
            for chunk in chunks
        ]
        return [point for one in pending for point in one.result()]


def _ask_server(store: Any, metric: str, run_ids: Sequence[str]) -> list[_Point]:
    """What its own pages ask; where that is too much at once, run by run."""
    parameters = {"run_id": list(run_ids), "metric_key": metric, "max_results": _BULK_POINTS}
    answer = http_request(  # type: ignore[no-untyped-call]
        store.get_host_creds(), _BULK, "GET", params=parameters
    )
    if answer.status_code != 200:
        told = f"the tracking server answers {answer.status_code} to {_BULK}"
        code = get_error_code(answer.status_code)  # type: ignore[no-untyped-call]
        raise MlflowException(told, code)
    found = answer.json()["metrics"]
    if len(found) < _BULK_POINTS:
        return [(one["run_id"], metric, one["step"], one["value"]) for one in found]
    return [
        (run_id, metric, one.step, one.value)
        for run_id in run_ids
        for one in store.get_metric_history(run_id, metric)
    ]


def _curve(points: Mapping[int, float]) -> Curve:
    images = np.array(sorted(points), np.int64)
    return Curve(images, np.array([points[int(at)] for at in images], np.float64))
