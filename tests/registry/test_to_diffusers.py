"""A model of Wan in diffusers' own pipeline: the platform's pictures, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from facm_core.diffusers_pipeline import FewStepScheduler
from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.samplers import sample_noise
from facm_platform import storage
from facm_platform.config.sections import RunConfig
from facm_platform.registry import import_wan, load_artifact, save_artifact
from facm_platform.registry.generator import Generator
from facm_platform.registry.to_diffusers import ToDiffusersConfig, ToDiffusersPlan, prepare
from facm_platform.tracking import Store
from tests.tiny_wan import FLOW_SHIFT, SHAPE, TEXT, write_pipeline, write_text_encoder

HEIGHT, WIDTH = 16, 32
PROMPTS, SEEDS = ["a handwritten digit", "one two"], [7, 8]
Prepare = Callable[..., ToDiffusersPlan]


@pytest.fixture
def prepared(tmp_path: Path, store: Store) -> Prepare:
    """``prepared(field=value)`` -> the plan for ``student``, a pair of experts, to ``output``.

    Beside it lie the ``pipeline`` and the ``teacher`` that was imported from it.
    """
    write_pipeline(tmp_path / "pipeline", boundary=0.6)
    config = import_wan.ImportWanConfig(
        run=RunConfig(name="wan", storage_uri=str(tmp_path / "runs")),
        source_uri=str(tmp_path / "pipeline"),
        height=HEIGHT,
        width=WIDTH,
        tokens=TEXT[0],
        sampling=GuidanceConfig(scale=3.0, low=0.1),
        output_uri=str(tmp_path / "teacher"),
    )
    import_wan.prepare(config).execute()
    write_student(tmp_path)

    def make(**changes: Any) -> ToDiffusersPlan:
        values = {"artifact_uri": str(tmp_path / "student"), "output_uri": str(tmp_path / "output")}
        return prepare(ToDiffusersConfig(**values | changes))

    return make


def write_student(folder: Path, **changes: Any) -> None:
    """The teacher's weights as a student's, in ``student``."""
    teacher = load_artifact(str(folder / "teacher"))
    student: dict[str, Any] = {
        "role": "student",
        "objective": "facm",
        "conditioning": "expanded",
        "recommended_nfe": (2, 4),
        "teacher_sha256": teacher.sha256,
    }
    config = dataclasses.replace(teacher.config, **student | changes)
    save_artifact(folder / "student", teacher.model.state_dict(), config)


def load(folder: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> torch.Tensor:
    return sample_noise((SHAPE[0], HEIGHT // 2, WIDTH // 2), SEEDS)[:, :, None]


def test_a_student_draws_what_the_service_draws(prepared: Prepare, tmp_path: Path) -> None:
    result = prepared().execute()
    assert result.artifact_uri == str(tmp_path / "output")
    pipeline = load(tmp_path / "output")
    assert type(pipeline.scheduler) is FewStepScheduler
    assert pipeline.config.boundary_ratio == 0.6
    generator = Generator.load(str(tmp_path / "student"))
    for steps in (1, 4):
        pipeline.scheduler.seeds = SEEDS
        (images,) = pipeline(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_frames=1,
            num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=TEXT[0],
            latents=noise(),
            return_dict=False,
        )
        assert images.shape == (2, 1, HEIGHT, WIDTH, 3)
        expected = generator.generate(PROMPTS, SEEDS, steps).permute(0, 2, 3, 1).numpy()
        got = np.round(255 * images[:, 0])
        assert np.abs(got - expected).max() <= 1
        assert (got == expected).mean() > 0.99
        assert np.abs(expected[0].astype(float) - expected[1]).max() > 20
    pipeline.scheduler.seeds = SEEDS[:1]
    with pytest.raises(InvalidInputError, match=r"scheduler.seeds = \[7\]: not one for each of 2"):
        pipeline(PROMPTS, height=HEIGHT, width=WIDTH, num_frames=1, guidance_scale=1.0)


def test_its_readme_runs(prepared: Prepare, tmp_path: Path) -> None:
    """Both snippets, but for the device."""
    prepared().execute()
    readme = (tmp_path / "output" / "README.md").read_text()
    call, ours = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    call = call.replace("FOLDER", str(tmp_path / "output")).replace("bfloat16", "float32")
    call = call.replace('.to("cuda")', "").replace("\npipeline(\n", "\nasked = dict(\n")
    call = call.replace('    "a red', '    prompt="a red')
    assert call.count("asked") == 1
    names: dict[str, Any] = {}
    exec(f"{call}\n{ours.replace('...', '**asked')}", names)
    names["pipeline"](**names["asked"])
    assert "2, 4 steps" in readme


def test_a_teacher_is_diffusers_own(prepared: Prepare, tmp_path: Path) -> None:
    prepared(artifact_uri=str(tmp_path / "teacher")).execute()
    found, theirs = load(tmp_path / "output"), load(tmp_path / "pipeline")
    assert type(found.scheduler) is FlowMatchEulerDiscreteScheduler
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    got, expected = (
        pipeline(
            PROMPTS,
            height=HEIGHT,
            width=WIDTH,
            num_frames=1,
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=noise(),
            output_type="latent",
            max_sequence_length=TEXT[0],
            return_dict=False,
        )[0]
        for pipeline in (found, theirs)
    )
    assert torch.equal(got, expected)
    readme = (tmp_path / "output" / "README.md").read_text()
    assert "guidance_scale=3.0" in readme
    assert "at times from 0.1 to 1 only" in readme


def test_what_is_copied_is_copied_to_the_byte(
    prepared: Prepare, tmp_path: Path, bucket: str
) -> None:
    plan = prepared(output_uri=f"{bucket}/wan", pipeline_uri=str(tmp_path / "pipeline"))
    assert "student" in plan.describe()
    plan.execute()
    with storage.local_copy(f"{bucket}/wan") as folder:
        for part in ("vae", "text_encoder", "tokenizer"):
            for file in (tmp_path / "pipeline" / part).iterdir():
                assert (folder / part / file.name).read_bytes() == file.read_bytes()
        load(folder)


def test_what_does_not_fit(prepared: Prepare, tmp_path: Path, teacher_uri: str) -> None:
    with pytest.raises(
        InvalidInputError, match=r"artifact_uri = .*draws 10 classes, and is no Wan"
    ):
        prepared(artifact_uri=teacher_uri)
    with pytest.raises(InvalidInputError, match=r"artifact_uri = .*there is no such folder"):
        prepared(artifact_uri=str(tmp_path / "nothing"))
    with pytest.raises(InvalidInputError, match=r"output_uri = .*it is not empty"):
        prepared(output_uri=str(tmp_path / "teacher"))
    with pytest.raises(InvalidInputError, match=r"pipeline_uri = .*no pipeline with text_encoder"):
        prepared(pipeline_uri=str(tmp_path / "nothing"))
    shutil.copytree(tmp_path / "pipeline", tmp_path / "other")
    write_text_encoder(tmp_path / "other", ["a digit"], seed=1)
    with pytest.raises(
        InvalidInputError, match=r"pipeline_uri = .*other': its hash is .* expected"
    ):
        prepared(pipeline_uri=str(tmp_path / "other"))
    index = tmp_path / "pipeline" / "model_index.json"
    for content, problem in (
        ({"tokenizer": ["mine", "Words"]}, "its tokenizer is mine.Words, not one of transformers"),
        ({}, "it names no tokenizer"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(InvalidInputError, match=rf"pipeline_uri = .*index.json': {problem}"):
            prepared()
    architecture = load_artifact(str(tmp_path / "student")).config.architecture
    write_student(tmp_path, architecture=dataclasses.replace(architecture, height=4))
    with pytest.raises(InvalidInputError, match=r"artifact_uri = .*sides of \(8, 32\) pixels"):
        prepared()
    write_student(tmp_path, normalisation_mean=(0.0,) * 4)
    with pytest.raises(InvalidInputError, match=r"pipeline_uri = .*vae': it normalises latents by"):
        prepared()
    write_student(tmp_path, autoencoder_sha256="0" * 64)
    with pytest.raises(InvalidInputError, match=r"pipeline_uri = .*vae': its hash is"):
        prepared()
    write_student(tmp_path, text_encoder_id="words")
    with pytest.raises(InvalidInputError, match=r"pipeline_uri = 'words': this text encoder is no"):
        prepared()
    write_student(tmp_path, text_encoder_id="")
    with pytest.raises(InvalidInputError, match=r"artifact_uri = .*does not say by which text"):
        prepared()
    assert not (tmp_path / "output").exists()
