"""Wan with a slow time embedding, from diffusers' folder and back into one, on real workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from mlflow import MlflowClient

from facm_core.autoencoders import load_autoencoder
from facm_core.diffusers_pipeline import FewStepScheduler, save_pipeline
from facm_platform.latents import LatentStream, local_batches
from facm_platform.registry import load_artifact
from tests.jobs.conftest import RunJob, last_line
from tests.tiny_wan import SIDE, TEXT, write_pipeline, write_texts

FAST = 7  # of 16 sinusoids, 1000 * 10000 ** (-k / 16) > 20


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_student_with_a_slow_time_embedding(run_job: RunJob, tmp_path: Path) -> None:
    write_pipeline(tmp_path / "pipeline", boundary=None)
    vae = load_autoencoder("vae", tmp_path / "pipeline" / "vae")
    manifest = write_texts(tmp_path / "set", by=vae)
    tracked = ["run.name=wan", f"run.tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    size = [f"height={SIDE}", f"width={SIDE}", f"tokens={TEXT[0]}"]
    done = run_job("import_wan", *tracked, "source_uri=pipeline", *size, "output_uri=wan")
    assert done.returncode == 0, done.stderr
    tracked.append("data.uri=set")

    # A random network is farther from what slow sinusoids can do than a trained one.
    warm_up = ["teacher.uri=wan", "output_uri=slow", "steps=50", "max_velocity_error=0.5"]
    done = run_job("slow_time", *tracked, *warm_up)
    assert done.returncode == 0, done.stderr
    result = last_line(done.stdout)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tangents = {
        network: [m.value for m in client.get_metric_history(result["run_id"], name)]
        for network in ("teacher", "after")
        for name in [f"tangent_rms/{network}"]
    }
    assert len(tangents["teacher"]) == 8
    assert max(tangents["after"]) < 0.1 * min(tangents["teacher"])

    done = run_job(
        "distill",
        *tracked,
        "teacher.uri=slow",
        "train.images=64",
        "train.global_batch_size=16",
        "train.learning_rate=3e-3",
        "train.weight_decay=0.1",
        "train.precision=bfloat16",
        "train.log_images=16",
        "train.export_sigma_rel=0.05",
    )
    assert done.returncode == 0, done.stderr
    teacher, student = (
        load_artifact(str(uri))
        for uri in (tmp_path / "slow", last_line(done.stdout)["artifact_uri"])
    )
    assert student.config.architecture == teacher.config.architecture
    assert student.config.teacher_sha256 == teacher.sha256
    linear = "network.condition_embedder.time_embedder.linear_1.weight"
    weight, before = (m.model.get_parameter(linear) for m in (student, teacher))
    moved = (weight != before).unflatten(1, (2, -1))
    assert not weight.unflatten(1, (2, -1))[..., :FAST].any()
    assert moved[..., FAST:].all()

    # diffusers knows nothing of slow sinusoids; it is given what the platform has stored.
    (batch,) = local_batches(LatentStream(str(tmp_path / "set"), manifest, 0), 0, 8, 8)
    t = torch.linspace(0, 2, 8)
    expected = student.model(batch.latents, t, batch.condition)
    save_pipeline(tmp_path / "diffusers", student.model, FewStepScheduler())
    plain = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer")
    assert type(plain.condition_embedder.timesteps_proj).__name__ == "Timesteps"
    condition: Any = batch.condition
    text = condition["text_embedding"].float() * condition["text_mask"][..., None]
    with torch.no_grad():
        output = plain(batch.latents[:, :, None], 1000 * (1 - t), text).sample
    torch.testing.assert_close(-output[:, :, 0], expected, rtol=1e-5, atol=1e-5)
