"""Captioned digits: that the text path learns, not only runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from facm_platform.evaluation.extractors import load_extractor
from facm_platform.registry.generator import Generator
from tests.jobs.conftest import RunJob, last_line
from tests.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
IMAGES = "train.images=76800"


def test_four_steps_are_as_good_as_the_teachers_forty(
    run_job: RunJob, tmp_path: Path, world: World
) -> None:
    for job, *options in (
        ("encode",),
        ("pretrain", IMAGES),
        ("distill", IMAGES),
        ("evaluate", f"features_uri={world.features}", "nfe=[4]", "teacher_nfe=[40]"),
    ):
        done = run_job(job, "--recipe", f"captions_{job}", *options, timeout=900)
        assert done.returncode == 0, done.stderr
    measured = last_line(done.stdout)["metrics"]
    assert measured["fid_nfe4"] <= 1.3 * measured["teacher_fid_nfe40"]

    # What a prompt asks for is what it gets, by a classifier that knows no prompts.
    generator = Generator.load(str(tmp_path / "runs" / "captions-student" / "artifact"))
    digits = [number % 10 for number in range(200)]
    prompts = [f"a handwritten {digit}" for digit in digits]
    images = generator.generate(prompts, seeds=range(10**6, 10**6 + 200), steps=4)
    seen = load_extractor("fitted", world.features)(images).labels
    assert seen is not None
    assert (seen == torch.tensor(digits)).float().mean() > 0.95
