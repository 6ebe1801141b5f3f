"""What the platform, checkpoints and validation cost the steps of a distillation.

Machines change their speed from minute to minute by more than what is measured here. So both sides
of a comparison take turns within one run, a few steps each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from multiprocessing.connection import Connection
from operator import truediv
from pathlib import Path
from statistics import mean, median

import torch

from facm_core.errors import require
from facm_platform.config import JobResult
from facm_platform.latents import Batch, LatentStream
from facm_platform.storage import join, read_text, write_bytes
from facm_platform.tracking import connect_store, embedded_root
from facm_platform.tracking.store import new_client
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.distill import DistillConfig, DistillPlan
from facm_platform.training.distill import prepare as prepare_distillation
from facm_platform.training.loop import train as run_loop
from facm_platform.training.ray_context import MakeContext, RayContext
from facm_platform.training.task import TrainingTask

# Steps of a window, whose mean time is one measurement; the first window warms up.
_WINDOW_STEPS = 4

_PLATFORM, _ASYNC, _SYNC = "platform", "asynchronous", "synchronous"
_VALIDATED = "validated"

_WINDOWS = "windows.json"


@dataclass(frozen=True)
class OverheadPlan:
    """The same steps beside a bare loop, with checkpoints of either kind, validated."""

    distillations: Mapping[str, DistillPlan]

    def describe(self) -> str:
        """The platform's runs."""
        return "\n".join(plan.describe() for plan in self.distillations.values())

    def execute(self) -> JobResult:
        """Measure, and print the table."""
        plans = self.distillations
        bare, platform = zip(*_windows(plans[_PLATFORM], BesideBareLoop), strict=True)
        stall, synchronous = _stall(plans[_ASYNC]), _stall(plans[_SYNC])
        metrics = {
            "bare_seconds": median(bare),
            "platform_seconds": median(platform),
            "overhead": median(map(truediv, platform, bare)) - 1,
            "checkpoint_seconds": stall,
            "synchronous_checkpoint_seconds": synchronous,
            "checkpoint_stall": stall / synchronous,
        }
        if _VALIDATED in plans:
            metrics |= validation_cost(_windows(plans[_VALIDATED], BesideValidation))
        print(_table(metrics), flush=True)
        some = plans[_PLATFORM]
        return JobResult(
            run_id=None,
            run_name=some.config.run.name,
            artifact_uri=some.folder_uri,
            metrics=metrics,
        )


def prepare(config: DistillConfig) -> OverheadPlan:
    """Validate the distillations; their runs have what they measure behind their name.

    If the recipe has a `validation`, one run more has it, and the recipe's checkpoints.

    Raises:
        InvalidInputError: more than one worker, too few steps to measure, or see
            `facm_platform.training.distill.prepare`.
    """
    count = config.workers.max
    require(count == 1, "workers.max", count, "the bare loop is one process", "Use 1")
    train = config.train
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
        configs[_VALIDATED] = replace(config, train=common)
    return OverheadPlan(
        {
            name: prepare_distillation(
                replace(one, run=replace(config.run, name=f"{config.run.name}-{name}"))
            )
            for name, one in configs.items()
        }
    )


class _Timed(RayContext):
    """A worker's context that times windows of steps, and keeps them in the run's folder."""

    def __init__(self, task: TrainingTask, stall_seconds: float) -> None:
        super().__init__(task, stall_seconds)
        self._windows: list[tuple[float, float]] = []

    def between(self) -> float:
        """What is kept with the window that begins; does not count for its time."""
        raise NotImplementedError

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """See `RayContext`. A window is over when the batch after its last one is asked for."""
        batches = super().batches(stream, start_row, stop_row, batch_rows)
        for _ in range((stop_row - start_row) // batch_rows // _WINDOW_STEPS):
            beside, began = self.between(), time.perf_counter()
            yield from islice(batches, _WINDOW_STEPS)
            self._windows.append((beside, (time.perf_counter() - began) / _WINDOW_STEPS))
        yield from batches

    def close(self) -> None:
        """See `RayContext`."""
        write_bytes(join(self._folder_uri, _WINDOWS), json.dumps(self._windows).encode())
        super().close()


class BesideBareLoop(_Timed):
    """Keeps the seconds of a bare loop's step, taken before each window by a process of its own."""

    def __init__(self, task: TrainingTask, stall_seconds: float) -> None:
        super().__init__(task, stall_seconds)
        spawned = multiprocessing.get_context("spawn")
        self._turns, theirs = spawned.Pipe()
        given = task, theirs, torch.get_num_threads(), str(self.device)
        self._process = spawned.Process(target=_bare_loop, args=given, daemon=True)
        self._process.start()
        theirs.close()  # so that the end of its process is the end of the pipe

    def between(self) -> float:
        """Seconds of its step."""
        self._turns.send(None)
        return float(self._turns.recv())

    def close(self) -> None:
        """See `RayContext`."""
        self._process.kill()
        super().close()


class BesideValidation(_Timed):
    """Keeps how many checkpoints are being measured when a window begins."""

    def between(self) -> float:
        """How many."""
        return self.unmeasured()


class _Turns(LocalContext):
    """A bare loop's: batches in memory, a window of them when it is told to."""

    def __init__(self, turns: Connection, folder: Path, device: str) -> None:
        super().__init__(folder, device)
        self._turns = turns

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """See `LocalContext`."""
        batches = iter(list(super().batches(stream, start_row, stop_row, batch_rows)))
        while True:
            self._turns.recv()
            began = time.perf_counter()
            yield from islice(batches, _WINDOW_STEPS)
            self._turns.send((time.perf_counter() - began) / _WINDOW_STEPS)


def _bare_loop(task: TrainingTask, turns: Connection, threads: int, device: str) -> None:
    """The loop in a plain process, without Ray Train, Ray Data and tracking, until it is killed."""
    torch.set_num_threads(threads)
    train = task.train
    # The last window of a run has no end; of this one, no window is the last.
    images = train.total_images + _WINDOW_STEPS * train.global_batch_size
    with (
        tempfile.TemporaryDirectory() as folder,
        single_process_group(),
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
    ):
        task = replace(task, run_id=None, train=replace(train, images=images))
        run_loop(task, _Turns(turns, Path(folder), device))


def _windows(plan: DistillPlan, make_context: MakeContext) -> list[tuple[float, float]]:
    """What was kept with each window of a run, and the seconds of its steps; not of the first."""
    plan.execute(make_context=make_context)
    windows: list[tuple[float, float]] = json.loads(read_text(join(plan.folder_uri, _WINDOWS)))
    return windows[1:]


def validation_cost(windows: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds of a step while a checkpoint was being measured, while none was, and on the whole.

    Args:
        windows: Of each, how many were being measured as it began, and the seconds of its steps.

    Returns:
        Without what cannot be told, for lack of windows of either kind.
    """
    beside, alone = [], []
    # Of the last one, the second end is not known.
    for (waiting, seconds), (still_waiting, _) in pairwise(windows):
        if waiting and still_waiting:
            beside.append(seconds)
        elif not waiting and not still_waiting:
            alone.append(seconds)
    if not beside or not alone:
        return {}
    return {
        "unvalidated_seconds": mean(alone),
        "validated_seconds": mean(beside),
        "validated_share": len(beside) / (len(beside) + len(alone)),
        "validated_speed": mean(alone) / mean(seconds for _, seconds in windows),
    }


def _stall(plan: DistillPlan) -> float:
    """Seconds that a run spent on a checkpoint, mean."""
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
    return stalled / max(1, (train.total_images - 1) // train.checkpoint_images)


def _table(metrics: Mapping[str, float]) -> str:
    lines = [
        f"step, bare loop            {metrics['bare_seconds']:8.3f} s",
        f"step, platform             {metrics['platform_seconds']:8.3f} s  "
        f"{metrics['overhead']:+.1%}",
        f"checkpoint, synchronous    {metrics['synchronous_checkpoint_seconds']:8.3f} s",
        f"checkpoint, asynchronous   {metrics['checkpoint_seconds']:8.3f} s  "
        f"{metrics['checkpoint_stall']:.2f} of that",
    ]
    if "validated_seconds" in metrics:
        lines += [
            f"step, nothing measured     {metrics['unvalidated_seconds']:8.3f} s",
            f"step, checkpoint measured  {metrics['validated_seconds']:8.3f} s  "
            f"{metrics['validated_share']:.0%} of the time",
            f"speed of the whole run     {metrics['validated_speed']:8.2f} of that without",
        ]
    return "\n".join(lines)
