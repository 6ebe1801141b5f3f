"""Wan from its pipeline and a file of prompts to pictures over HTTP, by the jobs alone."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from facm_core.models.base import select_rows
from facm_core.objectives import FACM, FACMConfig
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.null_text import NullText
from facm_platform.registry import load_artifact
from facm_platform.registry.artifact import WEIGHTS
from facm_platform.registry.generator import Generator
from tests.jobs.conftest import RunJob, last_line, serving
from tests.serving.test_service import call
from tests.small import write_digits
from tests.tiny_wan import SIDE, TEXT, write_pipeline
from tests.world import write_features

BOUNDARY = 0.6
PROMPTS = ["one", "two", "three", "four", "a digit", "a handwritten one", "two two", "three four"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_pipeline_and_prompts_to_a_service(run_job: RunJob, tmp_path: Path) -> None:
    experts = write_pipeline(tmp_path / "pipeline", boundary=BOUNDARY)
    (tmp_path / "prompts.txt").write_text("".join(f"{words}\n" for words in PROMPTS))
    tracked = ["run.name=wan", f"run.tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    size = [f"height={SIDE}", f"width={SIDE}", f"tokens={TEXT[0]}"]
    done = run_job("import_wan", *tracked, "source_uri=pipeline", *size, "output_uri=wan")
    assert done.returncode == 0, done.stderr
    teacher = load_artifact(str(tmp_path / "wan"))
    assert last_line(done.stdout)["artifact_uri"] == teacher.uri

    done = run_job(
        "synthesise",
        *tracked,
        "prompts_uri=prompts.txt",
        "per_prompt=8",
        "teacher.uri=wan",
        "steps=8",
        "sampling.scale=2",
        "output_uri=set",
        "part_rows=32",
    )
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["metrics"] == {"rows": 64, "parts": 2, "quarantined": 0}
    manifest = LatentManifest.load(str(tmp_path / "set"))
    assert NullText.load(str(tmp_path / "set"), manifest).encoder_id == str(tmp_path / "pipeline")

    (batch,) = local_batches(LatentStream(str(tmp_path / "set"), manifest, 0), 0, 8, 8)
    t = torch.tensor([0.0, 0.39, 0.41, 0.9]).repeat(2)
    got = teacher.model(batch.latents, t, batch.condition)
    for row, expert in enumerate([0, 0, 1, 1] * 2):
        some: Any = select_rows(batch.condition, torch.tensor([row]))
        text = some["text_embedding"].float() * some["text_mask"][..., None]
        x, timestep = batch.latents[row : row + 1, :, None], 1000 * (1 - t[row : row + 1])
        with torch.no_grad():
            output = experts[expert].eval()(x, timestep, text).sample
        torch.testing.assert_close(got[row], -output[0, :, 0], rtol=1e-5, atol=1e-5)

    done = run_job(
        "distill",
        *tracked,
        "data.uri=set",
        "teacher.uri=wan",
        "train.images=480",
        "train.global_batch_size=16",
        "train.learning_rate=3e-3",
        "train.log_images=48",
        "train.health_images=48",
        "train.export_sigma_rel=0.05",
    )
    assert done.returncode == 0, done.stderr
    workers = dict(re.findall(r"worker (\d of 2): process (\d+)", done.stdout))
    assert set(workers) == {"0 of 2", "1 of 2"}
    assert len(set(workers.values())) == 2
    # Each has stored its own shards.
    checkpoint = max((tmp_path / "runs" / "wan").glob("checkpoint_0*"))
    assert {file.name for file in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    # The whole loss is not among them: that of the shortcut changes more with the times drawn than
    # in thirty steps.
    for name in ("loss_fm", "anchor_drift"):
        history = client.get_metric_history(last_line(done.stdout)["run_id"], name)
        values = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
        assert len(values) == 10
        assert sum(values[5:]) < 0.95 * sum(values[:5]), values
    uri = Path(last_line(done.stdout)["artifact_uri"])
    student, stored = load_artifact(str(uri)), load_file(uri / WEIGHTS)
    assert student.config.teacher_sha256 == teacher.sha256
    assert student.config.latent_manifest_sha256 == manifest.sha256
    assert student.config.text_encoder_id == str(tmp_path / "pipeline")
    assert student.config.architecture == teacher.config.architecture
    # At the same times and noise the whole loss has fallen, though by the anchor's part alone: the
    # teacher is random, and its shortcut no easier in thirty steps.
    (batch,) = local_batches(LatentStream(str(tmp_path / "set"), manifest, 0), 0, 64, 64)
    with torch.no_grad():
        before, after = (
            FACM(FACMConfig(guidance=student.config.guidance))(
                model,
                batch.latents,
                batch.condition,
                teacher.model,
                generator=torch.Generator().manual_seed(0),
            ).loss
            for model in (teacher.model, student.model)
        )
    assert after < 0.95 * before
    held = student.model.state_dict()
    assert held.keys() == stored.keys() == teacher.model.state_dict().keys()
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(held[name], stored[name])
        assert torch.equal(held[name], tensor) == ("null_text" in name), name

    # Any set with labels will do, of images like those that the autoencoder makes.
    digits = write_digits(tmp_path / "digits", rows=320, channels=3)
    write_features(tmp_path / "features", tmp_path / "digits", digits, epochs=1)
    done = run_job(
        "evaluate",
        "run.name=look",
        tracked[1],
        "data.uri=set",
        f"student_uri={uri}",
        "teacher_uri=wan",
        "features_uri=features",
        "samples=32",
        "nfe=[1,2]",
        "teacher_nfe=[4]",
        "actors=1",
        "register_as=pictures",
    )
    assert done.returncode == 0, done.stderr
    metrics = last_line(done.stdout)["metrics"]
    assert {"fid_nfe1", "fid_nfe2", "teacher_fid_nfe4"} <= set(metrics)
    done = run_job("promote", "model=pictures", "nfe=2", tracked[1].removeprefix("run."))
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["metrics"] == {"fid": metrics["fid_nfe2"]}

    generator = Generator.load(str(uri))
    with serving(tmp_path, "model=pictures", tracked[1].removeprefix("run.")) as (url, process):
        for seed, prompt in enumerate(PROMPTS[-2:]):
            asked = {"prompt": prompt, "seed": seed, "steps": 4}
            answer = call(f"{url}/generate", json.dumps(asked).encode())
            assert (answer.status, answer.headers["X-Model-Version"]) == (200, "1")
            with Image.open(io.BytesIO(answer.content)) as picture:
                pixels = np.asarray(picture).transpose(2, 0, 1)
            assert np.array_equal(pixels, generator.generate([prompt], [seed], 4)[0])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
