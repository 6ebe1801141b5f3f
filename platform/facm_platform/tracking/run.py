"""One MLflow run and what a job writes to it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

from facm_core.errors import require
from facm_platform.config import as_dict, as_yaml, config_hash
from facm_platform.tracking.store import Store, TrackingConfig, new_client

Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]

TAG_PREFIX = "facm."
# MLflow refuses longer values and larger batches.
_PARAM_CHARACTERS = 6000
_PARAMS_PER_CALL = 100


class Run:
    """A run of `store`; every method is one call to it and raises when that fails."""

    def __init__(self, store: Store, run_id: str, name: str) -> None:
        self.store = store
        self.run_id = run_id
        self.name = name

    @property
    def artifact_uri(self) -> str:
        """Root of the run's artifacts."""
        return str(self.store.client.get_run(self.run_id).info.artifact_uri)

    def log_metrics(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Log numbers against a count of images. (`MetricSender` does so without waiting.)"""
        now = int(time.time() * 1000)
        entries = [Metric(key, float(value), now, images_seen) for key, value in metrics.items()]
        self.store.client.log_batch(self.run_id, metrics=entries)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file into `folder`, or what a directory holds."""
        client = self.store.client
        upload = client.log_artifacts if path.is_dir() else client.log_artifact
        upload(self.run_id, str(path), folder)

    def log_text(self, text: str, file: str) -> None:
        """Keep `text` as the artifact `file`."""
        self.store.client.log_text(self.run_id, text, file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a name without a dot gets our prefix."""
        entries = [RunTag(_prefixed(key), value) for key, value in tags.items()]
        self.store.client.log_batch(self.run_id, tags=entries)

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run."""
        self.store.client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if error is None else "FAILED")


def check_run_name(field: str, name: str) -> None:
    """Raise `InvalidInputError` unless `name` can name files and runs."""
    require(
        re.fullmatch(r"[\w.-]+", name) is not None,
        field,
        name,
        "not usable as a name of files and runs",
        "Use letters, digits, dot, dash and underscore",
    )


def open_run(
    store: Store,
    run_name: str,
    *,
    job: str,
    config: Any,
    tags: Mapping[str, str] | None = None,
    resume: bool = False,
) -> Run:
    """Start a run, or continue the last one of that name and job.

    It carries the whole configuration (parameters and ``config.yaml``) and the tags
    ``facm.run_name``, ``facm.job``, ``facm.config_hash`` and, where there is one,
    ``facm.git_commit``.

    Args:
        store: From `connect_store`.
        run_name: The user's name for it.
        job: Which job, e.g. ``distill``: the same name may serve several.
        config: The job's configuration dataclass.
        tags: Further lineage, e.g. ``{"teacher_sha256": …}``.
        resume: Continue the latest run of this name and job, if there is one.
    """
    check_run_name("run_name", run_name)
    known: dict[str, str] = {}
    run = find_run(store, run_name, job) if resume else None
    if run is None:
        tags_of_run = {MLFLOW_RUN_NAME: run_name, **_identity(run_name, job)}
        created = store.client.create_run(store.experiment_id, tags=tags_of_run)
        run = Run(store, str(created.info.run_id), run_name)
    else:
        known = dict(store.client.get_run(run.run_id).data.params)
        store.client.update_run(run.run_id, status="RUNNING")
    params = dict(flatten(as_dict(config)))
    # Parameters cannot change: a resumed run keeps its own, its config.yaml tells the latest.
    new = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), _PARAMS_PER_CALL):
        store.client.log_batch(run.run_id, params=new[start : start + _PARAMS_PER_CALL])
    run.log_text(as_yaml(config), "config.yaml")
    commit = git_commit()
    lineage = {"config_hash": config_hash(config)} | ({"git_commit": commit} if commit else {})
    run.set_tags(lineage | dict(tags or {}))
    return run


def find_run(store: Store, run_name: str, job: str) -> Run | None:
    """The latest run of that name and job, if there is one."""
    clauses = [f"tags.`{key}` = '{value}'" for key, value in _identity(run_name, job).items()]
    runs = store.client.search_runs(
        [store.experiment_id],
        filter_string=" and ".join(clauses),
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return Run(store, str(runs[0].info.run_id), run_name) if runs else None


def latest_metric(
    tracking: TrackingConfig, root: Path, metric: str, job: str, tags: Mapping[str, str]
) -> float | None:
    """Last value of `metric` in the latest run of `job` with these tags; None where there is none.

    Creates nothing, so that a dry run may ask.

    Args:
        tracking: The store.
        root: See `embedded_root`.
        metric: Its name.
        job: Name of the job.
        tags: Further ones of the run.
    """
    uri = tracking.resolve(root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None
    client = new_client(uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        return None
    wanted = {"job": job, **tags}
    clauses = [f"tags.`{_prefixed(key)}` = '{value}'" for key, value in wanted.items()]
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string=" and ".join([*clauses, f"metrics.`{metric}` > 0"]),
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return float(runs[0].data.metrics[metric]) if runs else None


def flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Nested dictionary -> ``a.b.c`` and text; values too long for MLflow in numbered parts."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}{key}.")
            continue
        text = str(value)
        if len(text) <= _PARAM_CHARACTERS:
            yield path + key, text
            continue
        for part, start in enumerate(range(0, len(text), _PARAM_CHARACTERS)):
            yield f"{path}{key}.part{part}", text[start : start + _PARAM_CHARACTERS]


def git_commit() -> str | None:
    """Commit of the running code, ``-dirty`` where files differ; None outside a git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _identity(run_name: str, job: str) -> dict[str, str]:
    return {"facm.run_name": run_name, "facm.job": job}


def _prefixed(key: str) -> str:
    return key if "." in key else TAG_PREFIX + key
