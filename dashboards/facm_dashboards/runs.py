"""What is told of runs in tables and in words."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from facm_platform.registry.artifact import OBJECTIVES
from facm_platform.tracking.reading import RunRecord

TRAINING = ("distill", "pretrain")
SILENT_SECONDS = 600.0
"""A training that has logged nothing for so long is told to be silent."""
TABLE_NFE = (1, 2, 4)

_SECTIONS = {"mean_flow": "mean_flow", "scm": "scm", "objective": "facm"}
_FID = re.compile(r"fid_nfe(\d+)")


@dataclass(frozen=True, kw_only=True)
class Fid:
    """A distance.

    Attributes:
        value: It.
        error: Its standard error; None where that is not known.
        protocol: By which it was measured.
    """

    value: float
    error: float | None
    protocol: str


def method(run: RunRecord) -> str:
    """How it trains, or what it does otherwise."""
    if run.job == "pretrain":
        return OBJECTIVES["flow_matching"]
    if run.job == "distill":
        for section, name in _SECTIONS.items():
            if any(key.startswith(f"{section}.") for key in run.params):
                return OBJECTIVES[name]
    return run.job.replace("_", " ") or "other"


def images_seen(run: RunRecord) -> int | None:
    """How far a training is; None of a run that does not train."""
    if run.job not in TRAINING or not run.metrics:
        return None
    return max(latest.images for latest in run.metrics.values())


def total_images(run: RunRecord) -> int | None:
    """How long a training is meant to be."""
    given = run.params.get("train.images", "")
    return int(given) if given.isdigit() and run.job in TRAINING else None


def silent_seconds(run: RunRecord) -> float | None:
    """For how long a training that should be running has said nothing; None while all is well."""
    # Others tell their numbers at the end.
    if run.status != "RUNNING" or run.job not in TRAINING:
        return None
    last = max([run.started, *(latest.milliseconds for latest in run.metrics.values())])
    silent = time.time() - last / 1000
    return silent if silent > SILENT_SECONDS else None


def own_fids(run: RunRecord) -> dict[int, Fid]:
    """By steps, as the run itself has measured them."""
    found = {}
    for name, latest in run.metrics.items():
        if match := _FID.fullmatch(name):
            found[int(match[1])] = Fid(
                value=latest.value, error=run.value(f"{name}_error"), protocol=_protocol(run)
            )
    return dict(sorted(found.items()))


def evaluations(run: RunRecord, runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Those that have measured what this run has trained, the latest first."""
    weights, config = run.tags.get("model_sha256"), run.tags.get("config_hash")
    return [
        one
        for one in runs
        if one.job == "evaluate"
        and (
            one.tags.get("model_sha256") == weights
            if weights
            else config is not None and one.tags.get("training_config_hash") == config
        )
    ]


class Fids:
    """FIDs of all runs, of their own or by their latest evaluation.

    Args:
        runs: All of them.
    """

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self._by_weights: dict[str, RunRecord] = {}
        self._by_config: dict[str, RunRecord] = {}
        for run in reversed(runs):
            if run.job == "evaluate":
                self._by_weights[run.tags.get("model_sha256", "")] = run
                self._by_config[run.tags.get("training_config_hash", "")] = run

    def of(self, run: RunRecord) -> dict[int, Fid]:
        """By steps; an evaluation's go before those that were measured on the way."""
        weights, config = run.tags.get("model_sha256"), run.tags.get("config_hash")
        found = self._by_weights.get(weights) if weights else None
        if weights is None and config and run.ended is not None:
            found = self._by_config.get(config)
        evaluated = {} if found is None or run.job == "evaluate" else own_fids(found)
        return own_fids(run) | evaluated


def matches(run: RunRecord, words: str) -> bool:
    """Whether every word is in its name, id, method, state or job."""
    text = f"{run.name} {run.run_id} {method(run)} {run.status} {run.job}".lower()
    return all(word in text for word in words.lower().split())


def orders(fids: Fids) -> Mapping[str, object]:
    """Names of the orders of the table, each with its key."""
    far = float("inf")

    def fid(steps: int) -> object:
        return lambda run: f.value if (f := fids.of(run).get(steps)) else far

    return {
        "started": lambda run: -run.started,
        "name": lambda run: run.name,
        "method": lambda run: (method(run), run.name),
        "state": lambda run: (run.status, -run.started),
        "images": lambda run: -(images_seen(run) or -1),
        "speed": lambda run: -(run.value("images_per_second") or -1),
        **{f"fid{steps}": fid(steps) for steps in TABLE_NFE},
    }


def _protocol(run: RunRecord) -> str:
    if named := run.tags.get("protocol_id"):
        return named
    samples = run.params.get("validation.samples")
    return f"validation, {samples} samples" if samples else "not told"
