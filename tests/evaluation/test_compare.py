"""jobs/compare.py: three methods, one teacher, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.compare import METHODS, CompareConfig, as_table, prepare
from facm_platform.config import load_config
from facm_platform.registry import load_artifact
from facm_platform.tracking import Store
from tests.world import World


def config(world: World, root: Path, *options: str) -> CompareConfig:
    given = [
        f"features_uri={world.features}",
        "objective.guidance.scale=1",
        "train.images=32",
        "train.log_images=16",
        "samples=100",
        "nfe=[1,2]",
        "actors=1",
    ]
    return load_config(CompareConfig, None, [*world.options("methods", root), *given, *options])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_three_students_of_one_teacher(world: World, store: Store, tmp_path: Path) -> None:
    result = prepare(config(world, tmp_path / "runs")).execute()
    table = storage.read_text(storage.join(result.artifact_uri, "comparison.md"))
    rows = [line.split(" | ")[0] for line in table.splitlines()[2:6]]
    assert rows == ["| teacher", "| FACM", "| MeanFlow", "| sCM"]

    values = json.loads(storage.read_text(storage.join(result.artifact_uri, "comparison.json")))
    teachers = set()
    for method in METHODS:
        student = load_artifact(str(tmp_path / "runs" / f"methods-{method}" / "artifact")).config
        assert (student.objective, student.images_seen) == (method, 32)
        teachers.add(student.teacher_sha256)
        evaluation = tmp_path / "runs" / f"methods-{method}-evaluation" / "evaluation.json"
        measured = json.loads(evaluation.read_text())
        assert measured["protocol"]["id"] == values["protocol"]["id"]
        for steps in (1, 2):
            fid = measured["student"][str(steps)]["fid"]
            assert values["methods"][method][f"fid_nfe{steps}"] == fid
            assert result.metrics[f"{method}.fid_nfe{steps}"] == fid
            assert f"{fid:.2f}" in table
        assert values["methods"][method]["images_per_second"] > 0
    assert len(teachers) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["samples=101"], "samples = 101: not a multiple of the 10 classes"),
        (["features_uri=/nowhere"], "/nowhere"),
        (["scm.c=0"], "scm.c = 0.0: not positive"),
        (["train.global_batch_size=1"], "less than a row for each of workers.max"),
    ],
)
def test_what_cannot_work_is_refused_before_any_training(
    world: World, store: Store, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        prepare(config(world, tmp_path / "runs", *options))


def test_the_table() -> None:
    rows = {
        "teacher": {"fid_nfe1": 191.754},
        "facm": {"fid_nfe1": 17.0, "images_per_second": 1234.5, "memory_mib": 600.0},
    }
    assert as_table(rows, (1,), "p").splitlines()[:4] == [
        "| method | FID at 1 | images/s | peak MiB |",
        "| --- | ---: | ---: | ---: |",
        "| teacher | 191.75 |  |  |",
        "| FACM | 17.00 | 1,234 | 600 |",
    ]
