"""What a run was made from: each thing by the job that made it."""

from __future__ import annotations

import pytest

from facm_dashboards.lineage import lineage
from facm_platform.tracking.reading import RunRecord


def run(job: str, **tags: str) -> RunRecord:
    return RunRecord(
        run_id=f"id-{job}",
        name=f"my-{job}",
        job=job,
        status="FINISHED",
        started=0,
        ended=1,
        parent_id=None,
        tags=tags,
        params={"source.kind": "folder"} if job == "encode" else {},
        metrics={},
    )


@pytest.mark.parametrize(
    ("of_set", "of_teacher", "source"),
    [
        ("encode", "pretrain", "folder"),
        ("import", "pretrain", "latents"),
        ("synthesise", "import_wan", "prompts"),
        ("synthesise", "slow_time", "prompts"),
    ],
)
def test_a_student_and_its_teacher_know_where_they_come_from(
    of_set: str, of_teacher: str, source: str
) -> None:
    data = run(of_set, manifest_sha256="data")
    teacher = run(of_teacher, manifest_sha256="data", model_sha256="teacher")
    student = run("distill", manifest_sha256="data", teacher_sha256="teacher", model_sha256="s")
    others = [
        run(job, manifest_sha256="other", model_sha256="other") for job in ("encode", "sheet")
    ]
    runs = [*others, student, teacher, data]
    for one, here in ((student, "student"), (teacher, "teacher")):
        stages = {stage.name: stage.nodes for stage in lineage(one, runs, [])}
        assert {name: [node.title for node in nodes] for name, nodes in stages.items()} == {
            "images": [source],
            "latent set": [f"my-{of_set}"],
            "teacher": [f"my-{of_teacher}"],
            "student": ["my-distill"],
            "version": ["not registered"],
        }
        assert [name for name, nodes in stages.items() if nodes[0].here] == [here]


def test_what_is_not_tracked_is_said() -> None:
    student = run("distill", manifest_sha256="0123456789abcdef", teacher_sha256="fedcba9876543210")
    stages = {stage.name: stage.nodes[0] for stage in lineage(student, [student], [])}
    assert [stages[name].title for name in ("images", "latent set", "teacher")] == [
        "not tracked",
        "encoded elsewhere",
        "trained elsewhere",
    ]
    assert stages["teacher"].detail == "fedcba987654"
