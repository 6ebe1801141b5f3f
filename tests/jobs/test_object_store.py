"""From images to a trained teacher over HTTP, with a killed driver; also on a bad day."""

from __future__ import annotations

import io
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from facm_platform import storage
from facm_platform.latents import LatentManifest
from facm_platform.latents.inspection import stats, verify
from tests.faulty_s3 import FaultyS3
from tests.jobs.conftest import command, environment, last_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES = 400


def write_images(uri: str) -> None:
    """Four classes of noise about a shade, and three files that are no images."""
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        label = index % 4
        pixels = np.clip(random.normal(60 * label + 30, 20, (9, 11, 3)), 0, 255)
        content = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(content, "PNG")
        storage.write_bytes(f"{uri}/class_{label}/{index:04d}.png", content.getvalue())
    for name in ("class_0/empty.png", "class_1/text.png", "class_3/cut.png"):
        storage.write_bytes(f"{uri}/{name}", content.getvalue()[:50] if "cut" in name else b"")


def encode(images: str, uri: str) -> list[str]:
    """Eight parts, one after the other."""
    return command(
        "encode",
        "run.name=encode",
        "source.kind=folder",
        f"source.uri={images}",
        "source.size=8",
        f"output_uri={uri}",
        "part_rows=50",
        "batch_size=16",
        "workers.count=1",
        "max_quarantined=0.02",
    )


def pretrain(uri: str, runs: str) -> list[str]:
    """Twelve steps of two workers over two and a half epochs."""
    return command(
        "pretrain",
        "--recipe",
        "digits_pretrain",
        "run.name=teacher",
        f"run.storage_uri={runs}",
        f"data.uri={uri}",
        "network.patch_size=4",
        "network.hidden_size=16",
        "network.depth=2",
        "network.num_heads=2",
        "train.images=960",
        "train.warmup_images=0",
        "train.global_batch_size=80",
        "train.checkpoint_images=320",
        "train.log_images=320",
        "workers.max=2",
    )


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return last_line(done.stdout)


def interrupted(arguments: list[str], folder: Path, uri: str) -> list[str]:
    """Names of what is there when the driver is killed, some time after the second part."""
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while sum("part-" in n and n.endswith(".json") for n in storage.list_files(uri)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Its workers notice, and end; what one was about to write may still appear.
    time.sleep(5)
    return list(storage.list_files(uri))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, object_store: None) -> dict[str, bytes]:
    """What comes of the same images on a folder, with nothing in between."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_images(str(folder / "images"))
    run(encode(str(folder / "images"), str(folder / "set")), folder)
    run(pretrain(str(folder / "set"), str(folder / "runs")), folder)
    return results(str(folder / "set"), str(folder / "runs"))


def results(uri: str, runs: str) -> dict[str, bytes]:
    """The parts, and the weights."""
    parts = {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)}
    parts.pop("manifest.json")
    weights = storage.read_bytes(f"{runs}/teacher/artifact/model.safetensors")
    return parts | {"weights": weights}


@pytest.mark.parametrize("mode", ["", "503", "cut"])
def test_images_to_teacher_over_http(
    mode: str,
    undisturbed: dict[str, bytes],
    bucket: str,
    tmp_path: Path,
    faulty_s3: Callable[[str], FaultyS3],
) -> None:
    write_images(f"{bucket}/images")
    endpoint = faulty_s3(mode) if mode else None
    images, uri, runs = (f"{bucket}/{name}" for name in ("images", "set", "runs"))

    names = interrupted(encode(images, uri), tmp_path, uri)
    assert "manifest.json" not in names
    assert "_progress/part-00001.json" in names
    assert "_progress/part-00007.json" not in names
    made = run(encode(images, uri), tmp_path)
    assert made["metrics"] == {"rows": IMAGES, "parts": 9.0, "quarantined": 3.0}
    assert verify(uri).metrics["bad_parts"] == 0
    assert stats(uri).metrics["max_relative_difference"] == 0
    run([*pretrain(uri, runs), f"run.tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"], tmp_path)

    assert results(uri, runs) == undisturbed
    reasons = {entry.key: entry.reason for entry in LatentManifest.load(uri).quarantined}
    assert reasons.keys() == {"class_0/empty.png", "class_1/text.png", "class_3/cut.png"}
    if endpoint is not None:
        print(f"{endpoint.requests} requests, {dict(endpoint.injected)}")
        assert sum(endpoint.injected.values()) > 20
        assert endpoint.errors == []
