"""Small training tasks, and their oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from facm_core.ema import PowerEMA
from facm_core.models import LightningDiT
from facm_core.objectives import FACM, FACMConfig, FlowMatchingConfig
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.registry import load_artifact
from facm_platform.training.config import TrainConfig
from facm_platform.training.loop import step_seed
from facm_platform.training.task import TrainingTask
from tests.small import artifact_config

TRAIN = TrainConfig(
    images=96,
    global_batch_size=8,
    learning_rate=1e-3,
    warmup_images=16,
    checkpoint_images=32,
    log_images=16,
)
MakeTask = Callable[..., TrainingTask]


@pytest.fixture
def make_task(tmp_path: Path, digits_uri: str, teacher_uri: str) -> MakeTask:
    """``make_task(**changes)`` -> a distillation of 12 steps."""

    def make(teacher: bool = True, **changes: object) -> TrainingTask:
        manifest = LatentManifest.load(digits_uri)
        task = TrainingTask(
            job="distill" if teacher else "pretrain",
            folder_uri=str(tmp_path / "run"),
            stream=LatentStream(digits_uri, manifest, seed=0),
            objective=FACMConfig() if teacher else FlowMatchingConfig(),
            train=TRAIN,
            teacher_uri=teacher_uri if teacher else None,
            artifact=artifact_config(manifest),
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            run_id=None,
        )
        return replace(task, **changes)  # type: ignore[arg-type]

    return make


def weights(task: TrainingTask) -> dict[str, torch.Tensor]:
    """The artefact that a run of `task` has left."""
    return load_file(Path(task.artifact_uri) / "model.safetensors")


def plain_distillation(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Oracle: averaged weights of the same steps without FSDP, Ray, contexts or windows."""
    assert task.teacher_uri is not None
    assert isinstance(task.objective, FACMConfig)
    teacher = load_artifact(task.teacher_uri).model
    student = LightningDiT(task.artifact.architecture)
    student.load_state_dict(teacher.state_dict())
    facm = FACM(task.objective)
    adamw = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], betas=(0.9, 0.999), weight_decay=0
    )
    ema = PowerEMA(student, [0.2])
    rows = TRAIN.global_batch_size
    for step, batch in enumerate(local_batches(task.stream, 0, TRAIN.images, rows)):
        seen = rows * (step + 1)
        generator = torch.Generator().manual_seed(step_seed(TRAIN.seed, rows * step))
        loss = facm(student, batch.latents, batch.condition, teacher, generator=generator).loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), TRAIN.max_grad_norm)
        adamw.param_groups[0]["lr"] = TRAIN.learning_rate * min(1.0, seen / TRAIN.warmup_images)
        adamw.step()
        ema.update(student, images_seen=seen, images_step=rows)
    return ema.profiles["0.2"]
