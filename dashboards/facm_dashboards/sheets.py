"""Sample sheets of a run: its students over training and steps, and the teacher beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from facm_dashboards.data import Data
from facm_dashboards.runs import evaluations
from facm_platform.evaluation.report import SHEET
from facm_platform.tracking.reading import RunRecord
from facm_platform.training.sheets import SHEETS

MOST_BYTES = 8 * 2**20
_STUDENT = re.compile(rf"{SHEETS}/student_nfe(\d+)_images(\d+)\.png")
_TEACHER = re.compile(rf"{SHEETS}/teacher_nfe(\d+)\.png")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Sheets:
    """Addresses of pictures.

    Attributes:
        images: Counts of images of the checkpoints, ascending.
        steps: Step counts, ascending.
        student: By ``STEPS/IMAGES``.
        teacher: Of the teacher; None for none.
        teacher_steps: Its steps.
        evaluated: Of the run's evaluations: name and address.
    """

    images: Sequence[int]
    steps: Sequence[int]
    student: dict[str, str]
    teacher: str | None
    teacher_steps: int | None
    evaluated: Sequence[tuple[str, str]]


def sheets_of(data: Data, run: RunRecord, runs: Sequence[RunRecord]) -> Sheets:
    """What pictures there are."""
    names = list(data.files(run.run_id, SHEETS))
    found = {(int(m[1]), int(m[2])): name for name in names if (m := _STUDENT.fullmatch(name))}
    teachers = [(int(m[1]), name) for name in names if (m := _TEACHER.fullmatch(name))]
    measuring = [run] if run.job == "evaluate" else evaluations(run, runs)
    evaluated = [
        (one.name, address(one.run_id, SHEET))
        for one in measuring[:3]
        if SHEET in data.files(one.run_id, "")
    ]
    return Sheets(
        images=sorted({images for _, images in found}),
        steps=sorted({steps for steps, _ in found}),
        student={f"{s}/{i}": address(run.run_id, name) for (s, i), name in found.items()},
        teacher=address(run.run_id, teachers[0][1]) if teachers else None,
        teacher_steps=teachers[0][0] if teachers else None,
        evaluated=evaluated,
    )


def address(run_id: str, name: str) -> str:
    """Of a picture."""
    return f"/runs/{run_id}/picture?name={name}"


def picture(data: Data, run: RunRecord, name: str) -> bytes:
    """A PNG of a run.

    Raises:
        FileNotFoundError: there is none of that name, it is too large, or no PNG.
    """
    if not name.endswith(".png"):
        raise FileNotFoundError(name)
    content = data.file(run, name, MOST_BYTES)
    if not content.startswith(_PNG):
        raise FileNotFoundError(name)
    return content
