"""The frame of every job: parse, prepare (validate), execute, print one JSON line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

from facm_core.errors import InvalidInputError
from facm_platform.config.loader import as_yaml, load_config

C = TypeVar("C")


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


class Refused(Exception):
    """Asked for rightly, and yet not done: the message says why.

    Args:
        message: For the user.
        result: What was found nevertheless.
    """

    def __init__(self, message: str, result: JobResult | None = None) -> None:
        super().__init__(message)
        self.result = result


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
    switches: Mapping[str, tuple[str, str]] | None = None,
) -> int:
    """Run a job from the command line.

    Args:
        schema: Configuration dataclass of the job.
        prepare: Validates everything reachable and returns the plan; raises `InvalidInputError`.
        description: One paragraph for ``--help``.
        switches: Further options, each with the override that it stands for and its help.

    Returns:
        Exit status, see `report`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a file of jobs/recipes, or a path")
    parser.add_argument("--print-config", action="store_true", help="print the whole config, stop")
    parser.add_argument(
        "--dry-run",
        "--plan",
        action="store_true",
        help="validate everything, print what would be done, start nothing",
    )
    parser.set_defaults(switched=None)
    for name, (override, meaning) in (switches or {}).items():
        parser.add_argument(
            name, dest="switched", action="append_const", const=override, help=meaning
        )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides")
    arguments = parser.parse_args(argv)

    def work() -> JobResult | None:
        overrides = [*arguments.overrides, *(arguments.switched or ())]
        config = load_config(schema, arguments.recipe, overrides)
        if arguments.print_config:
            print(as_yaml(config), end="")
            return None
        plan = prepare(config)
        if arguments.dry_run:
            print(plan.describe())
            return None
        return plan.execute()

    return report(work)


def report(work: Callable[[], JobResult | None]) -> int:
    """Do `work`; print its result, if it has one, as a line of JSON, or say what is wrong.

    Returns:
        Exit status: 0 done; 1 refused, or a run whose numbers are not finite; 2 input that the
        user must mend. Why is said on standard error.
    """
    status = 0
    try:
        result = work()
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        status, result = 1, refusal.result
    except FloatingPointError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        to_mend = _input_error(error)
        if to_mend is None:
            raise
        print(f"error: {to_mend}", file=sys.stderr)
        return 2
    if result is not None:
        print(json.dumps(asdict(result)), flush=True)
    return status


def _input_error(error: BaseException | None) -> InvalidInputError | None:
    """The `InvalidInputError` that `error` is, or that ended a Ray task, actor or worker."""
    # Ray's exceptions are of the type of their cause, but have its traceback for their text.
    cause = getattr(error, "cause", None)
    if isinstance(cause, InvalidInputError):
        return cause
    if error is None or isinstance(error, InvalidInputError):
        return error
    of_workers = getattr(error, "worker_failures", {}).values()
    found = (_input_error(inner) for inner in (cause, error.__cause__, *of_workers))
    return next(filter(None, found), None)
