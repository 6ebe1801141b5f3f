"""Promotion: the challenger becomes the champion when its FID is better, and not otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from facm_core.errors import InvalidInputError, require
from facm_platform.config import JobResult, Refused
from facm_platform.registry.artifact import load_artifact
from facm_platform.registry.versions import (
    CHALLENGER,
    CHAMPION,
    Version,
    check_model_name,
    downloaded,
    find_version,
)
from facm_platform.tracking import TrackingConfig, check_store, embedded_root, new_client


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Which model, judged how.

    Attributes:
        model: Registered model.
        nfe: Number of steps at which the FIDs are compared.
        storage_uri: Where the embedded MLflow store lies, as in the other jobs' ``run``.
        tracking: MLflow.
    """

    model: str
    nfe: int = 1
    storage_uri: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_model_name("model", self.model)
        require(self.nfe >= 1, "nfe", self.nfe, "below 1", "Use a whole number from 1")


@dataclass(frozen=True)
class PromotePlan:
    """A promotion that every gate has let pass."""

    config: PromoteConfig
    client: MlflowClient
    challenger: Version
    champion: Version | None

    def describe(self) -> str:
        """What would be done, with the numbers."""
        nfe = self.config.nfe
        now = f"FID {self.challenger.fid(nfe):.4g} at nfe = {nfe}, {self.challenger.protocol_id}"
        if self.champion is None:
            return f"promote {self.challenger} ({now}): there is no champion yet"
        return f"promote {self.challenger} ({now}): FID of {self.champion} is {self._former:.4g}"

    def execute(self) -> JobResult:
        """Move the alias."""
        self.client.set_registered_model_alias(self.config.model, CHAMPION, self.challenger.number)
        print(self.describe(), flush=True)
        fid = self.challenger.fid(self.config.nfe)
        assert fid is not None
        former = {} if self._former is None else {"former_fid": self._former}
        return JobResult(
            run_id=self.challenger.run_id,
            run_name=str(self.challenger),
            artifact_uri=f"models:/{self.config.model}@{CHAMPION}",
            metrics={"fid": fid, **former},
        )

    @property
    def _former(self) -> float | None:
        return None if self.champion is None else self.champion.fid(self.config.nfe)


def prepare(config: PromoteConfig) -> PromotePlan:
    """Put the challenger through every gate; changes nothing.

    Raises:
        Refused: no challenger, already champion, not measured, measured otherwise than the
            champion, not better, or an artefact that does not load. Says which.
        InvalidInputError: the tracking store does not answer.
    """
    root = embedded_root(config.storage_uri)
    check_store(config.tracking, root)
    uri = config.tracking.resolve(root)
    client = new_client(uri)
    challenger = find_version(client, config.model, CHALLENGER)
    if challenger is None:
        raise Refused(
            f"{config.model} has no {CHALLENGER} in {uri}; "
            f"register one with jobs/evaluate.py register_as={config.model}"
        )
    champion = find_version(client, config.model, CHAMPION)
    objection = _compare(challenger, champion, config.nfe) or _load(challenger, uri)
    if objection is not None:
        raise Refused(f"{challenger} is not promoted: {objection}")
    return PromotePlan(config, client, challenger, champion)


def _compare(challenger: Version, champion: Version | None, nfe: int) -> str | None:
    """What speaks against the challenger's numbers."""
    fid = challenger.fid(nfe)
    if fid is None:
        return f"its FID at nfe = {nfe} was not measured"
    if champion is None:
        return None
    if champion.number == challenger.number:
        return "it is the champion already"
    if champion.protocol_id != challenger.protocol_id:
        return (
            f"its FID is by protocol {challenger.protocol_id}, that of the champion ({champion}) "
            f"by {champion.protocol_id}: evaluate both by one protocol"
        )
    former = champion.fid(nfe)
    if former is None:
        return f"the FID of the champion ({champion}) at nfe = {nfe} was not measured"
    if not fid < former:
        return (
            f"its FID at nfe = {nfe} is {fid:.6g}, not below {former:.6g} of the champion "
            f"({champion}), both by protocol {challenger.protocol_id}"
        )
    return None


def _load(version: Version, tracking_uri: str) -> str | None:
    """What speaks against its artefact: it must load, and be the one that was evaluated."""
    try:
        with downloaded(version, tracking_uri) as folder:
            sha256 = load_artifact(str(folder), "source").sha256
    except InvalidInputError as error:
        return f"its artefact is broken: {error.problem}"
    except (MlflowException, OSError) as error:
        return f"its artefact cannot be fetched from {version.source} ({error})"
    if sha256 != version.tags.get("model_sha256"):
        return f"its weights have sha256 {sha256}, not the one evaluated"
    return None
