"""What a run was made from, and what was made from it: images to version."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from facm_dashboards.runs import evaluations
from facm_platform.registry.versions import Version
from facm_platform.tracking.reading import RunRecord

_SETS = ("encode", "import", "synthesise")
_TEACHERS = ("pretrain", "import_wan", "slow_time")
"""Jobs that make them."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """Of the graph.

    Attributes:
        title: Its name.
        detail: A hash, or a number.
        href: Address of its page; None where it has none.
        here: Whether it is the run that is looked at.
    """

    title: str
    detail: str = ""
    href: str | None = None
    here: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A column of the graph: each thing in it is made from the one before."""

    name: str
    nodes: Sequence[Node]


def lineage(run: RunRecord, runs: Sequence[RunRecord], versions: Iterable[Version]) -> list[Stage]:
    """The stages of a training run or of an evaluation; those that are not known say so."""
    manifest, teacher = run.tags.get("manifest_sha256"), run.tags.get("teacher_sha256")
    encoded = [one for one in runs if one.job in _SETS and _has(one, "manifest_sha256", manifest)]
    students = [run] if run.job == "distill" else _students(run, runs)
    teachers = [run] if run.job in _TEACHERS else _trained(teacher, runs)
    measured = {run.run_id} | {
        one.run_id for student in students for one in evaluations(student, runs)
    }
    registered = [version for version in versions if version.run_id in measured]
    stages = [
        Stage(name="images", nodes=[Node(title=_source(encoded[0]) if encoded else "not tracked")]),
        Stage(
            name="latent set",
            nodes=[_node(one, run, manifest) for one in encoded[:1]]
            or [Node(title="encoded elsewhere", detail=_short(manifest))],
        ),
        Stage(
            name="teacher",
            nodes=[_node(one, run, teacher) for one in teachers[:1]]
            or [Node(title="trained elsewhere" if teacher else "none", detail=_short(teacher))],
        ),
        Stage(
            name="student",
            nodes=[_node(one, run, one.tags.get("model_sha256")) for one in students[:4]]
            or [Node(title="none yet")],
        ),
        Stage(
            name="version",
            nodes=[
                Node(title=str(version), href=f"/registry/{version.model}#v{version.number}")
                for version in registered[:4]
            ]
            or [Node(title="not registered")],
        ),
    ]
    return stages


def _students(run: RunRecord, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Of an evaluation the one that it measured; of a teacher those that learned from it."""
    weights = run.tags.get("model_sha256")
    if run.job in _TEACHERS:
        return [
            one for one in runs if one.job == "distill" and _has(one, "teacher_sha256", weights)
        ]
    return [one for one in runs if one.job == "distill" and run in evaluations(one, runs)]


def _trained(weights: str | None, runs: Sequence[RunRecord]) -> list[RunRecord]:
    return [one for one in runs if one.job in _TEACHERS and _has(one, "model_sha256", weights)]


def _source(encoded: RunRecord) -> str:
    """What a set was made from."""
    if encoded.job == "synthesise":
        return "prompts"
    return encoded.params.get("source.kind") or "latents"


def _has(run: RunRecord, tag: str, value: str | None) -> bool:
    return value is not None and run.tags.get(tag) == value


def _node(one: RunRecord, run: RunRecord, sha256: str | None) -> Node:
    here = one.run_id == run.run_id
    return Node(title=one.name, detail=_short(sha256), href=f"/runs/{one.run_id}", here=here)


def _short(sha256: str | None) -> str:
    return "" if sha256 is None else sha256[:12]
