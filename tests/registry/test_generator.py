"""The generator against plain PyTorch, and what MLflow makes of a registered version."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import pickletools
import subprocess
import sys
import time
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import Generator
from facm_platform.registry.versions import CHALLENGER, CHAMPION
from facm_platform.tracking import Store
from tests.conftest import answers_on, free_port
from tests.serving.shop import MODEL, Shop, open_shop
from tests.small import write_model


@pytest.fixture
def shop(store: Store, tmp_path: Path) -> Shop:
    return open_shop(store, tmp_path)


def test_it_draws_one_and_many_alike(shop: Shop) -> None:
    """A batch of any size and order, sample by sample what plain PyTorch draws alone."""
    generator = Generator.load(str(shop.weights("1").parent))
    assert (generator.num_classes, generator.image_shape) == (10, (1, 8, 8))
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 16, 33, 64):
        for steps in (1, 3):
            labels = [int(label) for label in random.integers(10, size=size)]
            seeds = [int(seed) for seed in random.integers(2**53, size=size)]
            images = generator.generate(labels, seeds, steps)
            assert images.shape == (size, 1, 8, 8)
            for image, label, seed in zip(images, labels, seeds, strict=True):
                assert np.array_equal(image[0], shop.pixels("1", label, seed, steps))


def test_no_pixel_depends_on_the_size_of_the_batch(shop: Shop) -> None:
    """In float32, several of these quarter of a million pixels are another grey level."""
    many = 4096
    labels, seeds = [seed % 10 for seed in range(many)], list(range(many))
    noise = sample_noise((1, 8, 8), seeds).double()
    model = load_artifact(str(shop.weights("1").parent)).model.double()
    x = sample_consistency(model, noise, torch.tensor(labels), steps=1, seeds=seeds)
    x = x * shop.manifest.std[0] + shop.manifest.mean[0]
    expected = np.round((x.numpy().astype(np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)

    generator = Generator.load(str(shop.weights("1").parent))
    for size, of in ((many, many), (64, many), (7, many), (1, 512)):
        for start in range(0, of, size):
            rows = slice(start, min(start + size, of))
            images = generator.generate(labels[rows], seeds[rows], 1)
            assert np.array_equal(images, expected[rows])


def test_a_teacher_is_asked_by_euler_with_its_guidance(shop: Shop, tmp_path: Path) -> None:
    config = replace(shop.config, role="teacher", objective="flow_matching", guidance_scale=1.5)
    write_model(tmp_path / "teacher", config, seed=5)
    image = Generator.load(str(tmp_path / "teacher")).generate([3], [7], 4)[0, 0]
    artifact = load_artifact(str(tmp_path / "teacher"))
    noise = np.random.default_rng((7, 0)).standard_normal((1, 1, 8, 8)).astype(np.float32)
    x = sample_euler(
        artifact.model.double(),
        torch.from_numpy(noise).double(),
        torch.tensor([3]),
        steps=4,
        guidance=config.guidance,
    )
    x = x * shop.manifest.std[0] + shop.manifest.mean[0]
    pixels = np.round((x[0, 0].numpy().clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    assert np.array_equal(image, pixels)


def test_what_it_cannot_draw(shop: Shop) -> None:
    folder = str(shop.weights("1").parent)
    generator = Generator.load(folder)
    for labels, seeds, steps, field in (
        ([10], [0], 1, "label"),
        ([-1], [0], 1, "label"),
        ([0], [-1], 1, "seeds"),
        ([0], [], 1, "seeds"),
        ([0], [0], 0, "steps"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            generator.generate(labels, seeds, steps)
        assert caught.value.field == field
    values = json.loads((Path(folder) / "config.json").read_text())
    changed = json.dumps(values | {"autoencoder_sha256": "0" * 64})
    (Path(folder) / "config.json").write_text(changed)
    with pytest.raises(InvalidInputError, match="its hash is"):
        Generator.load(folder)


def test_a_registered_version_holds_no_pickle_and_no_path(shop: Shop, tmp_path: Path) -> None:
    folder = shop.weights("1").parent
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {"MLmodel", "model_code.py", "model.safetensors", "config.json"} <= {
        file.relative_to(folder).as_posix() for file in files
    }
    for file in files:
        assert file.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"), file
        assert not zipfile.is_zipfile(file), f"{file} may hold one"
        assert not is_pickle(file.read_bytes()), file
    for name in ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"):
        text = (folder / name).read_text()
        assert str(tmp_path) not in text
        assert str(Path(__file__).parents[2]) not in text
    assert load_artifact(str(folder)).sha256 == shop.versions["1"].tags["model_sha256"]


def is_pickle(content: bytes) -> bool:
    """Whether it can be read as one from the start; any may be, of the older protocols."""
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1
    except Exception:
        return False


def test_no_pickle_would_be_overlooked() -> None:
    for protocol in range(6):
        assert is_pickle(pickle.dumps({"a": [1, 2]}, protocol))


def test_mlflow_loads_it_under_its_alias(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    mlflow.set_tracking_uri(shop.store.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{MODEL}@{CHALLENGER}")
        rows = pd.DataFrame({"label": [3, 4, 5]})
        images = model.predict(rows, params={"steps": 2, "seed": 70})
        default = model.predict(rows)
    finally:
        mlflow.set_tracking_uri(None)
    assert images.dtype == np.uint8
    for row, label in enumerate((3, 4, 5)):
        assert np.array_equal(images[row, ..., 0], shop.pixels("2", label, 70 + row, steps=2))
        assert np.array_equal(default[row, ..., 0], shop.pixels("2", label, row, steps=1))


def environment(shop: Shop) -> dict[str, str]:
    """As a user's: this project is on no path, the model brings its code.

    `mlflow models serve` looks for uvicorn on the path, as activating the environment puts it.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return kept | {"MLFLOW_TRACKING_URI": shop.store.uri, "PATH": path}


def asked() -> dict[str, Any]:
    split = {"columns": ["label"], "data": [[3], [4]]}
    return {"dataframe_split": split, "params": {"steps": 2, "seed": 7}}


def check(predictions: Any, shop: Shop) -> None:
    for row, label in enumerate((3, 4)):
        pixels = shop.pixels("1", label, 7 + row, steps=2)
        assert np.array_equal(np.array(predictions[row])[..., 0], pixels)


def mlflow_models(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "models", *arguments, "--env-manager", "local"]
    return [*command, "-m", f"models:/{MODEL}@{CHAMPION}"]


def test_mlflow_models_predict(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(asked()))
    command = mlflow_models("predict", "-t", "json", "-i", "in.json", "-o", "out.json")
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(shop), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    check(json.loads((tmp_path / "out.json").read_text())["predictions"], shop)


@pytest.mark.slow
def test_mlflow_models_serve(shop: Shop, tmp_path: Path) -> None:
    port = free_port()
    command = mlflow_models("serve", "-h", "127.0.0.1", "-p", str(port))
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(shop),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not answers_on(port):
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps(asked()).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            check(json.loads(answer.read())["predictions"], shop)
    finally:
        # With the worker that it has started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
