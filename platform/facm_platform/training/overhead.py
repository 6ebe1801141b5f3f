"""What the platform, checkpoints and validation cost the steps of a distillation."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean, median

import ray
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from facm_core.ema import PowerEMA
from facm_core.errors import require
from facm_core.models import LightningDiT
from facm_platform.cluster import connected
from facm_platform.config import JobResult
from facm_platform.latents import local_batches
from facm_platform.registry import load_artifact
from facm_platform.tracking import connect_store, embedded_root
from facm_platform.tracking.store import new_client
from facm_platform.training.config import TrainConfig
from facm_platform.training.distill import DistillConfig, DistillPlan
from facm_platform.training.distill import prepare as prepare_distillation
from facm_platform.training.task import TrainingTask

# Steps of a window, whose mean time is one measurement; the first window warms up.
_WINDOW_STEPS = 4

# What the bare loop can do.
_PLAIN = {"precision": "float32", "compile": False, "offload": False, "micro_batch_size": None}

_PLATFORM, _ASYNC, _SYNC = "platform", "asynchronous", "synchronous"
_VALIDATED = "validated"


@dataclass(frozen=True)
class OverheadPlan:
    """The same steps: bare, on the platform, there with checkpoints of either kind, validated."""

    distillations: Mapping[str, DistillPlan]

    def describe(self) -> str:
        """The platform's runs."""
        return "\n".join(plan.describe() for plan in self.distillations.values())

    def execute(self) -> JobResult:
        """Measure, the bare loop before and after the others, and print the table."""
        some = self.distillations[_PLATFORM]
        task, workers = some.task("", ""), some.config.workers
        bare = ray.remote(num_cpus=workers.cpus, num_gpus=int(workers.gpu))(bare_loop)
        threads = workers.threads
        with connected():
            before = ray.get(bare.remote(task, threads))
            runs = {name: _measured(plan) for name, plan in self.distillations.items()}
            after = ray.get(bare.remote(task, threads))
        metrics = {
            "bare_seconds": median(before + after),
            "platform_seconds": median(runs[_PLATFORM].step_seconds),
            "checkpoint_seconds": runs[_ASYNC].stalled_seconds,
            "synchronous_checkpoint_seconds": runs[_SYNC].stalled_seconds,
        }
        metrics["overhead"] = metrics["platform_seconds"] / metrics["bare_seconds"] - 1
        metrics["checkpoint_stall"] = (
            metrics["checkpoint_seconds"] / metrics["synchronous_checkpoint_seconds"]
        )
        if _VALIDATED in runs:
            validated, plain = (mean(runs[name].step_seconds) for name in (_VALIDATED, _ASYNC))
            metrics |= {"validated_seconds": validated, "validated_speed": plain / validated}
        print(_table(metrics), flush=True)
        config = some.config.run
        return JobResult(
            run_id=None, run_name=config.name, artifact_uri=some.folder_uri, metrics=metrics
        )


def prepare(config: DistillConfig) -> OverheadPlan:
    """Validate the distillations; their runs have what they measure behind their name.

    If the recipe has a `validation`, one run more has it.

    Raises:
        InvalidInputError: more than one worker, too few steps to measure, or see
            `facm_platform.training.distill.prepare`.
    """
    count = config.workers.max
    require(count == 1, "workers.max", count, "the bare loop is one process", "Use 1")
    train = config.train
    for name, plain in _PLAIN.items():
        value = getattr(train, name)
        require(value == plain, f"train.{name}", value, "not the bare loop's", f"Use {plain}")
    steps = train.total_images // train.global_batch_size
    require(
        steps >= 4 * _WINDOW_STEPS,
        "train.images",
        train.images,
        f"{steps} steps are too few to measure",
        f"Train for {4 * _WINDOW_STEPS * train.global_batch_size} or more",
    )
    window = _WINDOW_STEPS * train.global_batch_size
    never, often = 2 * train.total_images, 2 * window
    common = replace(train, log_images=window, health_images=never, keep_averages=False)
    trains = {
        _PLATFORM: replace(common, checkpoint_images=never),
        _ASYNC: replace(common, checkpoint_images=often),
        _SYNC: replace(common, checkpoint_images=often, max_lost_images=often),
    }
    configs = {name: replace(config, train=one, validation=None) for name, one in trains.items()}
    if config.validation is not None:
        configs[_VALIDATED] = replace(configs[_ASYNC], validation=config.validation)
    return OverheadPlan(
        {
            name: prepare_distillation(
                replace(one, run=replace(config.run, name=f"{config.run.name}-{name}"))
            )
            for name, one in configs.items()
        }
    )


def bare_loop(task: TrainingTask, threads: int) -> list[float]:
    """Seconds of a step, mean of each window after the first: plain PyTorch, batches in memory."""
    torch.set_num_threads(threads)
    train: TrainConfig = task.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert task.teacher_uri is not None
    teacher = load_artifact(task.teacher_uri).model.to(device)
    student = LightningDiT(task.artifact.architecture).to(device)
    objective = task.build_objective()
    learned = objective.parameters() if isinstance(objective, nn.Module) else ()
    parameters = [p for p in (*student.parameters(), *learned) if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        fused=train.fused,
    )
    ema = PowerEMA(student, train.ema_sigma_rels)
    batch_size, seen = train.global_batch_size, 0
    batches = list(local_batches(task.stream, 0, train.total_images, batch_size))
    ends = []
    for number, batch in enumerate(batches):
        if number % _WINDOW_STEPS == 0:
            _wait(device)
            ends.append(time.perf_counter())
        here = batch.to(device)
        draws = objective.draw(tuple(batch.latents.shape)).to(device)
        output = objective(
            student, here.latents, here.condition, teacher, **draws.given(), images_seen=seen
        )
        optimizer.zero_grad()
        output.loss.backward()
        clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        seen += batch_size
        ema.update(student, images_seen=seen, images_step=batch_size)
    return [(end - start) / _WINDOW_STEPS for start, end in pairwise(ends)][1:]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Measured:
    """A run on the platform.

    Attributes:
        step_seconds: Mean of each window after the first.
        stalled_seconds: Mean of a checkpoint.
    """

    step_seconds: list[float]
    stalled_seconds: float


def _measured(plan: DistillPlan) -> _Measured:
    result = plan.execute()
    assert result.run_id is not None
    run, train = plan.config.run, plan.config.train
    store = connect_store(run.tracking, embedded_root(run.storage_uri))
    client = new_client(store.uri)
    speeds, shares = (
        [point.value for point in client.get_metric_history(result.run_id, name)]
        for name in ("images_per_second", "checkpoint_share")
    )
    stalled = sum(
        train.log_images / speed * share for speed, share in zip(speeds, shares, strict=True)
    )
    # The last checkpoint, at the end, is in no window.
    checkpoints = max(1, (train.total_images - 1) // train.checkpoint_images)
    seconds = [train.global_batch_size / speed for speed in speeds]
    return _Measured(seconds[1:], stalled / checkpoints)


def _table(metrics: Mapping[str, float]) -> str:
    bare, platform = metrics["bare_seconds"], metrics["platform_seconds"]
    asynchronous = metrics["checkpoint_seconds"]
    synchronous = metrics["synchronous_checkpoint_seconds"]
    lines = [
        f"step, bare loop            {bare:8.3f} s",
        f"step, platform             {platform:8.3f} s  {metrics['overhead']:+.1%}",
        f"checkpoint, synchronous    {synchronous:8.3f} s",
        f"checkpoint, asynchronous   {asynchronous:8.3f} s  "
        f"{metrics['checkpoint_stall']:.2f} of that",
    ]
    if "validated_seconds" in metrics:
        lines.append(
            f"step, checkpoints measured {metrics['validated_seconds']:8.3f} s  "
            f"{metrics['validated_speed']:.2f} x the speed without"
        )
    return "\n".join(lines)
