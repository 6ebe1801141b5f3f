"""The records of a search in MLflow, and what is found in them there, from any machine."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import optuna
from mlflow.tracking import MlflowClient

from facm_platform.config import load_config
from facm_platform.search.config import SearchConfig
from facm_platform.search.findings import Confirmed, Findings
from facm_platform.search.proposals import STATES
from facm_platform.search.records import Record
from facm_platform.search.space import parse
from facm_platform.tracking.reading import read_artifact

RECORDS = "records.json"
"""Artifact of a search's run, written anew with each change of a trial."""


def records_text(trials: Iterable[Record], confirming: Iterable[Record]) -> str:
    """What `read_findings` reads."""
    kept = {"trials": trials, "confirming": confirming}
    return json.dumps({name: [asdict(one) for one in some] for name, some in kept.items()})


def read_findings(client: MlflowClient, run_id: str) -> Findings:
    """Of a search that has ended, or of one under way, as far as it is.

    Raises:
        FileNotFoundError: the run has no records (yet).
        InvalidInputError: its ``config.yaml`` is none of a search of this version.
    """
    kept = json.loads(read_artifact(client, run_id, RECORDS))
    with tempfile.TemporaryDirectory(prefix="facm-") as folder:
        recipe = Path(folder, "config.yaml")
        recipe.write_bytes(read_artifact(client, run_id, recipe.name))
        config = load_config(SearchConfig, str(recipe), [])
    trials = [Record(**one) for one in kept["trials"]]
    confirming = [Record(**one) for one in kept["confirming"]]
    return Findings(config, trials, _study(config, trials), _candidates(config, confirming))


def _study(config: SearchConfig, trials: Sequence[Record]) -> optuna.Study:
    """Optuna's view of the trials that have ended."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, metrics = parse(config.space), config.objectives
    study = optuna.create_study(directions=["minimize"] * len(metrics))
    for record in trials:
        if record.ended:
            study.enqueue_trial(record.params)
            space.suggest(asked := study.ask())
            found = [record.last[name] for name in metrics] if record.finished else None
            study.tell(asked, found, state=STATES[record.state])
    return study


def _candidates(config: SearchConfig, confirming: Sequence[Record]) -> list[Confirmed]:
    """What the runs confirm, in the order of their numbers: the recipe first."""
    found: dict[str, Confirmed] = {}
    for record in sorted(confirming, key=lambda record: record.number):
        name = record.name.removeprefix(f"{config.run.name}-").rpartition("-seed")[0]
        found.setdefault(name, Confirmed(name, record.values)).runs.append(record)
    measured = (one for one in found.values() if math.isfinite(one.mean(config.objective)))
    return list(measured)
