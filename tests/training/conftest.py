"""Small training tasks, and their oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from facm_core.ema import PowerEMA
from facm_core.models import build_network
from facm_core.objectives import SCM, FACMConfig, FlowMatchingConfig
from facm_platform.latents import Batch, LatentManifest, LatentStream, local_batches
from facm_platform.registry import load_artifact
from facm_platform.training.config import TrainConfig
from facm_platform.training.context import LocalContext, single_process_group
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


@pytest.fixture
def process_group() -> Iterator[None]:
    """One rank, this process."""
    with single_process_group():
        yield


class Interrupted(Exception):
    """Stands for a killed process."""


class InterruptedContext(LocalContext):
    """Dies when asked for the batch after `batches_left`; `poison` makes one batch NaN."""

    def __init__(self, folder: Path, batches_left: int = 10**9, poison: int = -1) -> None:
        super().__init__(folder)
        self.batches_left, self.poison = batches_left, poison

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        for index, batch in enumerate(super().batches(stream, start_row, stop_row, batch_rows)):
            if index == self.batches_left:
                raise Interrupted
            bad = index == self.poison or self.poison == -2
            yield replace(batch, latents=batch.latents * float("nan")) if bad else batch


def weights(task: TrainingTask) -> dict[str, torch.Tensor]:
    """The artefact that a run of `task` has left."""
    return load_file(Path(task.artifact_uri) / "model.safetensors")


def plain_training(task: TrainingTask) -> dict[str, torch.Tensor]:
    """Oracle: averaged weights of the same steps without FSDP, Ray, contexts or windows."""
    teacher = load_artifact(task.teacher_uri).model if task.teacher_uri else None
    torch.manual_seed(TRAIN.seed)  # for the parameters that the teacher does not have
    student = build_network(task.artifact.architecture)
    if teacher is not None:
        start = teacher if task.student == "same" else getattr(teacher, task.student)
        student.load_state_dict(start.state_dict(), strict=False)
    elif task.artifact.architecture.text_shape:
        null = load_file(Path(task.stream.uri, "null_text.safetensors"))
        student.load_state_dict({f"null_{k}": v for k, v in null.items()}, strict=False)
    if task.lora is not None:
        add_plain_adapters(student, task)
    objective: Any = task.build_objective()
    parameters = [p for p in student.parameters() if p.requires_grad]
    parameters += objective.parameters() if isinstance(objective, SCM) else []
    adamw = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=0)
    ema = PowerEMA(student, [0.2])
    rows = TRAIN.global_batch_size
    for step, batch in enumerate(local_batches(task.stream, 0, TRAIN.images, rows)):
        seen = rows * (step + 1)
        generator = torch.Generator().manual_seed(step_seed(TRAIN.seed, rows * step))
        output = objective(
            student,
            batch.latents,
            batch.condition,
            teacher,
            generator=generator,
            images_seen=rows * step,
        )
        adamw.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, TRAIN.max_grad_norm)
        adamw.param_groups[0]["lr"] = TRAIN.learning_rate * min(1.0, seen / TRAIN.warmup_images)
        adamw.step()
        ema.update(student, images_seen=seen, images_step=rows)
    average = ema.profiles["0.2"]
    return average if task.lora is None else plainly_merged(student, average)


def add_plain_adapters(student: torch.nn.Module, task: TrainingTask) -> None:
    import peft  # takes seconds

    assert task.lora is not None
    torch.manual_seed(TRAIN.seed)
    config = peft.LoraConfig(
        r=task.lora.rank,
        lora_alpha=task.lora.alpha,
        target_modules=list(task.lora.targets or ()),
    )
    peft.inject_adapter_in_model(config, student)


def plainly_merged(
    student: torch.nn.Module, adapters: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """By peft's own merge, under the names that the network has without adapters."""
    from peft.tuners.lora import LoraLayer

    for name, value in adapters.items():
        student.get_parameter(name).data.copy_(value)
    for module in list(student.modules()):
        if isinstance(module, LoraLayer):
            module.merge()
    state = student.state_dict().items()
    return {n.replace(".base_layer.", "."): t for n, t in state if ".lora_" not in n}
