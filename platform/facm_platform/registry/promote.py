"""Promotion: a version becomes the champion when every gate lets it pass, and not otherwise."""

from __future__ import annotations

import getpass
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from facm_core.errors import InvalidInputError, require
from facm_platform.config import JobResult, Refused
from facm_platform.registry.artifact import read_artifact
from facm_platform.registry.promotions import Promotion, Promotions
from facm_platform.registry.reproduction import reproduces
from facm_platform.registry.versions import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Version,
    check_model_name,
    downloaded,
    find_version,
    get_version,
)
from facm_platform.tracking import TrackingConfig, check_store, embedded_root, new_client


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Which model, judged how.

    Attributes:
        model: Registered model.
        version: Of it; None for the challenger.
        nfe: Number of steps at which the FIDs are compared.
        z: The FID must be better by more than so many joint standard errors.
        min_precision: And the precision no lower than this; None for any.
        rollback: Make the previous champion champion again; it passed the gates before.
        reason: Why, in the user's words, for the audit.
        storage_uri: Of the runs, as in the other jobs' ``run``: promotions are kept below it, and
            the embedded MLflow store.
        tracking: MLflow.
    """

    model: str
    version: int | None = None
    nfe: int = 1
    z: float = 1.0
    min_precision: float | None = None
    rollback: bool = False
    reason: str = ""
    storage_uri: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_model_name("model", self.model)
        require(self.nfe >= 1, "nfe", self.nfe, "below 1", "Use a whole number from 1")
        require(0 <= self.z < math.inf, "z", self.z, "negative", "Use e.g. 1")
        lowest = self.min_precision
        require(
            lowest is None or 0 <= lowest <= 1,
            "min_precision",
            lowest,
            "no share",
            "Use a number from 0 to 1, or none",
        )
        require(
            not (self.rollback and self.version),
            "version",
            self.version,
            "a rollback is to the previous champion",
            "Leave one of them away",
        )


@dataclass(frozen=True)
class PromotePlan:
    """A promotion that every gate has let pass."""

    config: PromoteConfig
    promotions: Promotions
    number: int
    version: Version
    champion: Version | None

    def describe(self) -> str:
        """What would be done, with the numbers."""
        what = "roll back to" if self.config.rollback else "promote"
        return f"{what} {self.version}: {self._numbers}"

    def execute(self, who: str | None = None) -> JobResult:
        """Move the aliases, and say who did it (None: this process's user), when and why."""
        config = self.config
        # An earlier one that died half way.
        self.promotions.complete()
        self.promotions.add(
            Promotion(
                number=self.number,
                version=self.version.number,
                previous=self.champion.number if self.champion else None,
                who=who or getpass.getuser(),
                when=datetime.now(UTC).isoformat(timespec="seconds"),
                why="; ".join(filter(None, [config.reason, self.describe()])),
            )
        )
        print(self.describe(), flush=True)
        found = {"fid": self.version.fid(config.nfe)}
        if self.champion is not None:
            found["former_fid"] = self.champion.fid(config.nfe)
        return JobResult(
            run_id=self.version.run_id,
            run_name=str(self.version),
            artifact_uri=f"models:/{config.model}@{CHAMPION}",
            metrics={name: value for name, value in found.items() if value is not None},
        )

    @property
    def _numbers(self) -> str:
        nfe, protocol = self.config.nfe, self.version.protocol_id
        now = f"FID {_told(self.version, nfe)} at nfe = {nfe}, {protocol}"
        if self.champion is None:
            return f"{now}; there is no champion yet"
        return f"{now}; that of {self.champion} is {_told(self.champion, nfe)}"


def prepare(config: PromoteConfig) -> PromotePlan:
    """Put a version through every gate; changes nothing.

    Raises:
        Refused: no such version, champion already, or gates that it fails: all of them, with their
            numbers.
        InvalidInputError: the tracking store does not answer.
    """
    root = embedded_root(config.storage_uri)
    check_store(config.tracking, root)
    uri = config.tracking.resolve(root)
    client = new_client(uri)
    promotions = Promotions(client, config.model, config.storage_uri)
    # First: another promotion that comes in the meantime is noticed by it.
    last = promotions.last
    champion = promotions.champion()
    version = _previous(promotions, config) if config.rollback else _named(client, config, uri)
    if champion is not None and champion.number == version.number:
        raise Refused(f"{version} is not promoted: it is the champion already")
    judged = [] if config.rollback else gates(version, champion, config)
    failed = [objection for gate in judged for objection in gate.objections]
    failed += _artefact(version, uri)
    if failed:
        raise Refused(f"{version} is not promoted: " + "; ".join(failed))
    number = 1 if last is None else last.number + 1
    return PromotePlan(config, promotions, number, version, champion)


def _named(client: MlflowClient, config: PromoteConfig, uri: str) -> Version:
    """The version that is asked for, or the challenger."""
    if config.version is not None:
        version = get_version(client, config.model, str(config.version))
        what = f"version {config.version}"
    else:
        version, what = find_version(client, config.model, CHALLENGER), CHALLENGER
    if version is None:
        raise Refused(
            f"{config.model} has no {what} in {uri}; "
            f"register one with jobs/evaluate.py register_as={config.model}"
        )
    return version


def _previous(promotions: Promotions, config: PromoteConfig) -> Version:
    version = promotions.previous()
    if version is None:
        raise Refused(f"{config.model} has no {PREVIOUS} champion to go back to")
    return version


@dataclass(frozen=True)
class Gate:
    """One condition of a promotion that numbers decide.

    Attributes:
        name: What is looked at.
        measured: Of the version.
        needed: What lets it pass.
        objections: What speaks against it; empty if it passes.
    """

    name: str
    measured: str
    needed: str
    objections: tuple[str, ...] = ()


def gates(version: Version, champion: Version | None, config: PromoteConfig) -> Iterator[Gate]:
    """The numbers of a version, against the champion's. (`prepare` looks at its artefact, too.)"""
    nfe = config.nfe
    objections = tuple(_fid(version, champion, config))
    needed = "finite"
    if champion is not None:
        error = _joint_error(version, champion, nfe)
        needed = f"below {_told(champion, nfe)} by {config.z:g} joint standard errors"
        needed += "" if error is None else f" ({config.z * error:.2g})"
    yield Gate(f"FID at {nfe} step(s)", _told(version, nfe), needed, objections)
    if champion is not None:
        yield Gate(
            "protocol",
            str(version.protocol_id),
            str(champion.protocol_id),
            tuple(_protocol(version, champion)),
        )
    if config.min_precision is not None:
        precision = version.metric(f"precision_nfe{nfe}")
        yield Gate(
            f"precision at {nfe} step(s)",
            "not measured" if precision is None else f"{precision:.4g}",
            f"{config.min_precision:g} or more",
            tuple(_precision(precision, config)),
        )


def _fid(version: Version, champion: Version | None, config: PromoteConfig) -> Iterator[str]:
    nfe, fid = config.nfe, version.fid(config.nfe)
    if fid is None:
        yield f"its FID at nfe = {nfe} was not measured"
    elif not math.isfinite(fid):
        yield f"its FID at nfe = {nfe} is {fid}"
    if champion is None or champion.protocol_id != version.protocol_id:
        return
    former = champion.fid(nfe)
    if former is None:
        yield f"the FID of the champion ({champion}) at nfe = {nfe} was not measured"
    if fid is None or former is None:
        return
    error = _joint_error(version, champion, nfe)
    if error is None and config.z:
        yield f"the error of its FID or of that of the champion ({champion}) was not measured"
    elif not fid < former - config.z * (error or 0.0):
        yield (
            f"its FID at nfe = {nfe} is {_told(version, nfe)}, not better than "
            f"{_told(champion, nfe)} of the champion ({champion}) by more than "
            f"{config.z:g} joint standard errors, both by protocol {version.protocol_id}"
        )


def _joint_error(version: Version, champion: Version, nfe: int) -> float | None:
    """Of the difference of their FIDs; None where one was not measured."""
    errors = [one.metric(f"fid_nfe{nfe}_error") for one in (version, champion)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == 2 else None


def _protocol(version: Version, champion: Version) -> Iterator[str]:
    if champion.protocol_id != version.protocol_id:
        yield (
            f"its FID is by protocol {version.protocol_id}, that of the champion ({champion}) "
            f"by {champion.protocol_id}: evaluate both by one protocol"
        )


def _precision(precision: float | None, config: PromoteConfig) -> Iterator[str]:
    lowest = config.min_precision
    if precision is None:
        yield f"its precision at nfe = {config.nfe} was not measured"
    elif lowest is not None and precision < lowest:
        yield f"its precision at nfe = {config.nfe} is {precision:.4g}, below {lowest:g}"


def _artefact(version: Version, tracking_uri: str) -> Iterator[str]:
    """What speaks against its artefact: it must be the one that was evaluated, and work."""
    try:
        with downloaded(version, tracking_uri) as folder:
            sha256 = read_artifact(str(folder), "source").sha256
            objection = reproduces(folder)
    except InvalidInputError as error:
        yield f"its artefact is broken: {error.problem}"
        return
    except (MlflowException, OSError) as error:
        yield f"its artefact cannot be fetched from {version.source} ({error})"
        return
    if sha256 != version.tags.get("model_sha256"):
        yield f"its weights have sha256 {sha256}, not the one evaluated"
    if objection is not None:
        yield objection


def _told(version: Version, nfe: int) -> str:
    fid, error = version.fid(nfe), version.metric(f"fid_nfe{nfe}_error")
    number = "not measured" if fid is None else f"{fid:.6g}"
    return number if error is None else f"{number} ± {error:.2g}"
