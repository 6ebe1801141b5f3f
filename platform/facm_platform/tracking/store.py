"""Which MLflow store a job writes to: a server, or a file of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient

from facm_core.errors import InvalidInputError, require

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are tracked.

    Attributes:
        uri: MLflow tracking URI. None: the environment's ``MLFLOW_TRACKING_URI``, and without
            it a SQLite file and an artifact folder in the job's own folder.
        experiment: MLflow experiment, created when it does not exist.
    """

    uri: str | None = None
    experiment: str = "facm"

    def __post_init__(self) -> None:
        require(
            bool(self.experiment.strip()), "experiment", self.experiment, "empty", "Give a name"
        )
        if self.uri is not None:
            _require_known_scheme("uri", self.uri)

    def resolve(self, root: Path) -> str:
        """The URI in force; `root` is the job's folder, used by the embedded store only."""
        if self.uri is not None:
            return self.uri
        if from_environment := os.environ.get(URI_VARIABLE):
            _require_known_scheme(URI_VARIABLE, from_environment)
            return from_environment
        return f"sqlite:///{root.absolute() / 'mlflow.db'}"


@dataclass(frozen=True)
class Store:
    """A reachable store with its experiment.

    Attributes:
        uri: Resolved tracking URI; enough to open the store again in another process.
        client: Client of its runs and of its model registry.
        experiment_id: Where `open_run` puts runs.
    """

    uri: str
    client: MlflowClient
    experiment_id: str


def embedded_root(storage_uri: str) -> Path:
    """Folder of the embedded store of a job that keeps its results at `storage_uri`."""
    return Path("runs" if "://" in storage_uri else storage_uri)


def check_store(config: TrackingConfig, root: Path) -> None:
    """Make sure that the store can be reached; creates nothing, so that a dry run may ask.

    Raises:
        InvalidInputError: a server does not answer, or an embedded store cannot be made.
    """
    uri = config.resolve(root)
    if uri.startswith("sqlite:///"):
        # MLflow creates the file, and missing folders, at the first connection.
        folder = Path(uri.removeprefix("sqlite:///")).parent
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        usable = existing.is_dir() and os.access(existing, os.W_OK)
        require(usable, "tracking.uri", uri, f"cannot write to {existing}", "Use another folder")
        return
    _list_experiments(new_client(uri), uri)


def connect_store(config: TrackingConfig, root: Path) -> Store:
    """Open the store and its experiment, creating what is missing.

    Raises:
        InvalidInputError: the store does not answer; names its URI.
    """
    uri = config.resolve(root)
    artifacts: str | None = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        # MLflow's own default is `mlruns` of the current directory, whatever that is at the time.
        artifacts = str(folder / "artifacts" / config.experiment)
    client = new_client(uri)
    _list_experiments(client, uri)
    return Store(uri, client, _experiment_id(client, config.experiment, artifacts))


def new_client(uri: str) -> MlflowClient:
    """A client whose calls fail within seconds when the server is away.

    MLflow's defaults block for more than 200 s. A value set by the user stays.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # A bar per uploaded file would drown what the job itself says.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _require_known_scheme(field: str, uri: str) -> None:
    scheme = uri.partition("://")[0].partition("+")[0]
    require(
        "://" in uri and scheme in _SCHEMES,
        field,
        uri,
        "not a tracking URI that MLflow serves (it has given up plain folders)",
        "Use http(s)://HOST:PORT or sqlite:////FOLDER/mlflow.db",
    )


def _list_experiments(client: MlflowClient, uri: str) -> None:
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise InvalidInputError(
            "tracking.uri",
            uri,
            f"the tracking store does not answer ({str(error).splitlines()[0]})",
            f"Start the server, or unset {URI_VARIABLE} to use the embedded store",
        ) from error


def _experiment_id(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            # Another job was faster.
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
            found = client.get_experiment_by_name(name)
            assert found is not None
    deleted = found.lifecycle_stage == "deleted"
    require(
        not deleted,
        "tracking.experiment",
        name,
        "the experiment is in MLflow's bin",
        "Restore it with `mlflow experiments restore`, or use another name",
    )
    return str(found.experiment_id)
