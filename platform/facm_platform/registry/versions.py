"""Versions of a registered model: what is written with each, and how it is found again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from facm_core.errors import require
from facm_platform.tracking import Run
from facm_platform.tracking.reading import download_folder
from facm_platform.tracking.run import TAG_PREFIX

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"

_PER_CALL = 200


@dataclass(frozen=True)
class Version:
    """A registered version.

    Attributes:
        model: Name of the registered model.
        number: Its version, as MLflow counts.
        source: Address of the artefact.
        run_id: Run that registered it.
        tags: Ours, without their prefix.
    """

    model: str
    number: str
    source: str
    run_id: str
    tags: dict[str, str]

    @property
    def protocol_id(self) -> str | None:
        """Evaluation protocol of its FIDs."""
        return self.tags.get("protocol_id")

    def metric(self, name: str) -> float | None:
        """What it was measured to be, e.g. ``fid_nfe1``; None where it was not."""
        value = self.tags.get(name)
        return None if value is None else float(value)

    def fid(self, nfe: int) -> float | None:
        """Its FID at `nfe` steps, if it was measured."""
        return self.metric(f"fid_nfe{nfe}")

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"


def check_model_name(field: str, name: str) -> None:
    """Raise `InvalidInputError` unless MLflow takes `name` for a registered model."""
    fits = bool(name.strip()) and not set(name) & set("/:'\"")
    remedy = "Use a name without slash, colon and quotes"
    require(fits, field, name, "not usable as a model name", remedy)


def register_version(
    run: Run, model: str, folder: str, tags: Mapping[str, str], description: str
) -> Version:
    """Register what the run keeps in its artifact `folder` as the new challenger of `model`."""
    client = run.store.client
    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    created = client.create_model_version(
        model,
        source=f"{run.artifact_uri}/{folder}",
        run_id=run.run_id,
        tags={TAG_PREFIX + key: value for key, value in tags.items()},
        description=description,
    )
    number = str(created.version)
    client.set_registered_model_alias(model, CHALLENGER, number)
    return Version(model, number, str(created.source), run.run_id, dict(tags))


def find_version(client: MlflowClient, model: str, alias: str) -> Version | None:
    """The version that carries `alias`; None when the model or the alias does not exist."""
    # Not get_model_version_by_alias: its error is the same for a missing alias and a bad request.
    found = [m for m in client.search_registered_models(f"name = '{model}'") if m.name == model]
    if not found or alias not in found[0].aliases:
        return None
    return get_version(client, model, str(found[0].aliases[alias]))


def get_version(client: MlflowClient, model: str, number: str) -> Version | None:
    """The version of that number; None when there is none."""
    try:
        version = client.get_model_version(model, number)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None
    return _version(version)


def list_models(client: MlflowClient) -> dict[str, dict[str, str]]:
    """Aliases of every registered model, with the numbers of their versions."""
    found: dict[str, dict[str, str]] = {}
    token: str | None = None
    while token is None or token:
        page = client.search_registered_models(max_results=_PER_CALL, page_token=token)
        found |= {m.name: {k: str(v) for k, v in m.aliases.items()} for m in page}
        token = page.token or ""
    return found


def list_versions(client: MlflowClient) -> list[Version]:
    """All versions of all models, the latest of each first."""
    found: list[Version] = []
    token: str | None = None
    while token is None or token:
        page = client.search_model_versions(max_results=_PER_CALL, page_token=token)
        found += [_version(one) for one in page]
        token = page.token or ""
    return sorted(found, key=lambda version: (version.model, -int(version.number)))


def _version(found: ModelVersion) -> Version:
    tags = {
        key.removeprefix(TAG_PREFIX): value
        for key, value in found.tags.items()
        if key.startswith(TAG_PREFIX)
    }
    return Version(found.name, str(found.version), str(found.source), str(found.run_id), tags)


@contextmanager
def downloaded(version: Version, tracking_uri: str) -> Iterator[Path]:
    """A local copy of a version's artefact, gone when the block ends.

    Raises:
        MlflowException, OSError: it is not there any more.
    """
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        repository = get_artifact_repository(version.source, tracking_uri=tracking_uri)
        download_folder(repository, Path(folder))
        yield Path(folder)
