"""A model that draws prompts: the generator against plain PyTorch, MLflow, stored samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_core.text_encoders import load_text_encoder
from facm_platform.latents import LatentManifest
from facm_platform.registry import ArtifactConfig, generator, load_artifact
from facm_platform.registry.generator import Generator
from facm_platform.registry.pyfunc import pyfunc_files
from facm_platform.registry.reproduction import SAMPLES, reproduces, write_samples
from facm_platform.storage import upload_folder
from tests.tiny_wan import SHAPE, TEXT, write_student, write_text_encoder, write_texts

PROMPTS = ["a red barn in the snow", "two cats", "a lighthouse at night, with rain & wind " * 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent set, a text encoder, and a student that is sampled with a time shift."""
    folder = tmp_path_factory.mktemp("prompts")
    write_text_encoder(folder / "pipeline", PROMPTS)
    write_student(folder / "student", write_texts(folder / "set"), folder / "pipeline", shift=0.4)
    return folder


def drawn(folder: Path, name: str, prompt: str, seed: int, steps: int) -> np.ndarray[Any, Any]:
    """By plain PyTorch, alone."""
    artifact, pipeline = load_artifact(str(folder / name)), folder / "pipeline"
    config, model = artifact.config, artifact.model.double()
    encoder = load_text_encoder("", pipeline / "text_encoder", pipeline / "tokenizer", TEXT[0])
    condition = encoder.encode([prompt])._asdict()
    noise = sample_noise(SHAPE, [seed]).double()
    if config.role == "student":
        x = sample_consistency(
            model, noise, condition, steps=steps, seeds=[seed], shift=config.shift
        )
    else:
        given = {"guidance": config.guidance, "shift": config.shift}
        x = sample_euler(model, noise, condition, steps=steps, **given)  # type: ignore[arg-type]
    std, mean = (torch.tensor(v).double()[:, None, None] for v in _normalisation(config))
    pixels: np.ndarray[Any, Any] = (x[0] * std + mean).numpy()
    return np.round((pixels.astype(np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def _normalisation(config: ArtifactConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return config.normalisation_std, config.normalisation_mean


def test_a_sample_is_of_its_prompt_and_seed_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "_KEPT_PROMPTS", 2)
    of_student = Generator.load(str(folder / "student"))
    assert of_student.takes_prompts
    assert (of_student.num_classes, of_student.image_shape) == (0, SHAPE)
    expected = [drawn(folder, "student", PROMPTS[i % 3], i, 2) for i in range(7)]
    assert len({image.tobytes() for image in expected}) == 7
    alike = drawn(folder, "student", PROMPTS[1], 0, 2)
    assert not np.array_equal(alike, expected[0]), "the prompt matters"
    for size in (7, 3, 1):
        for start in range(0, 7, size):
            rows = range(start, min(start + size, 7))
            images = of_student.generate([PROMPTS[i % 3] for i in rows], rows, 2)
            for image, i in zip(images, rows, strict=True):
                assert np.array_equal(image, expected[i])


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_artefacts_shift_is_the_samplers(folder: Path, tmp_path: Path, role: str) -> None:
    write_text_encoder(tmp_path / "pipeline", PROMPTS)
    manifest = LatentManifest.load(str(folder / "set"))
    config: dict[str, Any] = {"role": role, "conditioning": "plain"}
    if role == "teacher":
        config |= {"objective": "flow_matching", "guidance_scale": 3.0}
    images = []
    for shift in (1.0, 0.4):
        write_student(tmp_path / role, manifest, tmp_path / "pipeline", shift=shift, **config)
        (image,) = Generator.load(str(tmp_path / role)).generate([PROMPTS[0]], [3], 4)
        assert np.array_equal(image, drawn(tmp_path, role, PROMPTS[0], 3, 4))
        images.append(image)
    assert not torch.equal(*images)


def test_what_it_cannot_draw(folder: Path, tmp_path: Path) -> None:
    of_student = Generator.load(str(folder / "student"))
    for subjects, field, message in (
        ([3], "label", "draws prompts and knows no classes"),
        ([""], "prompt", "empty"),
        ([" \n"], "prompt", "empty"),
    ):
        with pytest.raises(InvalidInputError, match=message) as caught:
            of_student.generate(subjects, [0], 1)  # type: ignore[arg-type]
        assert caught.value.field == field
    long = " ".join(["lighthouse"] * 5000)
    assert of_student.generate([long], [0], 1).shape == (1, *SHAPE), "the rest is cut off"

    upload_folder(folder / "student", str(tmp_path / "student"))
    told = json.loads((tmp_path / "student" / "config.json").read_text())
    for change, message in (
        ({"text_encoder_id": ""}, "does not say by which text encoder"),
        ({"text_encoder_id": str(tmp_path / "nowhere")}, "no pipeline with text_encoder"),
        ({"text_encoder_sha256": "0" * 64}, "its hash is"),
    ):
        (tmp_path / "student" / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(InvalidInputError, match=message):
            Generator.load(str(tmp_path / "student"))


def test_classes_are_no_prompts(teacher_uri: str) -> None:
    with pytest.raises(InvalidInputError, match="draws classes and knows no text"):
        Generator.load(teacher_uri).generate(["three"], [0], 1)


@pytest.fixture
def registered(folder: Path, tmp_path: Path) -> Path:
    """What jobs/evaluate.py registers."""
    upload_folder(folder / "student", str(tmp_path / "model"))
    artifact = load_artifact(str(folder / "student"))
    with pyfunc_files(artifact.config) as files:
        write_samples(files, artifact)
        upload_folder(files, str(tmp_path / "model"))
    return tmp_path / "model"


def test_a_version_makes_its_samples_again(registered: Path, folder: Path) -> None:
    assert reproduces(registered) is None
    with torch.random.fork_rng():
        manifest = LatentManifest.load(str(folder / "set"))
        write_student(registered, manifest, folder / "pipeline", seed=6)
    assert "does not make its stored samples" in str(reproduces(registered))
    assert (registered / SAMPLES).is_file()


def test_mlflow_loads_it(registered: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = mlflow.pyfunc.load_model(str(registered))
    rows = pd.DataFrame({"prompt": PROMPTS})
    images = model.predict(rows, params={"steps": 3, "seed": 70})
    for row, prompt in enumerate(PROMPTS):
        expected = drawn(folder, "student", prompt, 70 + row, 3)
        assert np.array_equal(images[row].transpose(2, 0, 1), expected)
    needed = (registered / "requirements.txt").read_text()
    assert "transformers==" in needed
    assert "ftfy==" in needed


@pytest.mark.slow
def test_mlflow_models_predict(registered: Path, folder: Path, tmp_path: Path) -> None:
    split = {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS[:2]]}
    asked = {"dataframe_split": split, "params": {"steps": 2, "seed": 7}}
    (tmp_path / "in.json").write_text(json.dumps(asked))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local"]
    command += ["-m", str(registered), "-t", "json", "-i", "in.json", "-o", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    predictions = json.loads((tmp_path / "out.json").read_text())["predictions"]
    for row in (0, 1):
        expected = drawn(folder, "student", PROMPTS[row], 7 + row, 2)
        assert np.array_equal(np.array(predictions[row]).transpose(2, 0, 1), expected)
