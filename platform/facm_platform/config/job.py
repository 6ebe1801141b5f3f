"""The frame of every job: parse, prepare (validate), execute, print one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

from facm_core.errors import InvalidInputError
from facm_platform.config.loader import as_yaml, load_config

C = TypeVar("C")


class Refused(Exception):
    """Asked for rightly, and yet not done: the message says why."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What a job leaves behind; printed as the last line of its standard output.

    Attributes:
        run_id: MLflow run id, None where the job keeps no run.
        run_name: The user's name for it.
        artifact_uri: Where the result lies.
        metrics: Final numbers.
    """

    run_id: str | None
    run_name: str
    artifact_uri: str
    metrics: dict[str, float] = field(default_factory=dict)


class Plan(Protocol):
    """A validated piece of work. Making one spends no cluster time; executing it does."""

    def describe(self) -> str:
        """What would be done, for ``--dry-run``."""

    def execute(self) -> JobResult:
        """Do it."""


def run_job(
    schema: type[C],
    prepare: Callable[[C], Plan],
    *,
    description: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a job from the command line.

    Args:
        schema: Configuration dataclass of the job.
        prepare: Validates everything reachable and returns the plan; raises `InvalidInputError`.
        description: One paragraph for ``--help``.

    Returns:
        Exit status: 0 done, 1 refused, 2 input that the user must mend (said on standard error).
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a file of jobs/recipes, or a path")
    parser.add_argument("--print-config", action="store_true", help="print the whole config, stop")
    parser.add_argument("--dry-run", action="store_true", help="validate everything, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(schema, arguments.recipe, arguments.overrides)
        if arguments.print_config:
            print(as_yaml(config), end="")
            return 0
        plan = prepare(config)
        if arguments.dry_run:
            print(plan.describe())
            return 0
        result = plan.execute()
    except InvalidInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)), flush=True)
    return 0
