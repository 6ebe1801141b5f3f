"""The training loop's world under Ray Train: rank, device, data, checkpoints."""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias, cast

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.data import DataIterator
from ray.train import (
    Checkpoint,
    CheckpointConsistencyMode,
    CheckpointUploadMode,
    ReportedCheckpoint,
    ReportedCheckpointStatus,
)
from ray.train.collective import broadcast_from_rank_zero

from facm_platform.latents import Batch, LatentStream
from facm_platform.latents.source import Make, Worker, ray_batches
from facm_platform.storage import filesystem, join, upload_folder
from facm_platform.training.context import Staged
from facm_platform.training.gauges import RunGauges
from facm_platform.training.task import TrainingTask
from facm_platform.training.watchdog import Watchdog

# Beyond it, Ray Train tells what it knows without the checkpoint that is being uploaded.
_ANSWER_SECONDS = 0.1

_WAITING = ReportedCheckpointStatus.PENDING_VALIDATION

# Of a checkpoint, the worst there is. Ray Train keeps it as JSON, which has no infinity.
_UNMEASURED = sys.float_info.max


MakeContext: TypeAlias = "Callable[[TrainingTask, float], RayContext]"
"""Of a run and `RayContext`'s ``stall_seconds``."""


class RayContext:
    """One Ray Train worker. To be made inside the worker's train function, by all of them.

    Args:
        task: The run. Ray Train knows its folder too.
        stall_seconds: See `Watchdog`.
    """

    def __init__(self, task: TrainingTask, stall_seconds: float) -> None:
        # Name of the distance by which checkpoints are compared (see `launch`).
        self._measured = task.validation.metric if task.validation else None
        self._watchdog = Watchdog(stall_seconds)
        self._folder_uri = task.folder_uri
        # Checkpoints are written beside the steps, whose collectives must not meet theirs.
        self._writers = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._written = threading.Event()
        self._written.set()
        self._saved: Checkpoint | None = None
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = ray.train.torch.get_device()
        # Always the same, so that a killed worker's successor clears away what it left.
        run = hashlib.sha256(self._folder_uri.encode()).hexdigest()[:16]
        self._scratch = Path(tempfile.gettempdir(), f"facm-checkpoint-{run}-{self.rank}")
        self._gauges = RunGauges(task) if self.rank == 0 else None
        if self._gauges:
            self._gauges.set(
                begun_seconds=time.time(),
                total_images=task.train.total_images,
                checkpoint_images=task.train.checkpoint_images,
            )

    def close(self) -> None:
        """All is done."""
        self._watchdog.close()
        if self._gauges:
            self._gauges.close()

    def moved(self, images_seen: int, doing: str) -> None:
        """Tell the watchdog, and monitoring."""
        self._watchdog.moved(images_seen, doing)
        if self._gauges:
            self._gauges.set(images_seen=images_seen)

    def publish(self, metrics: dict[str, float]) -> None:
        """As gauges, see `RunGauges`."""
        if self._gauges:
            self._gauges.set(**metrics)
            if self._measured is not None:
                self._gauges.set(unmeasured_checkpoints=self.unmeasured())

    def unmeasured(self) -> int:
        """How many checkpoints wait for their FID."""
        return sum(one.status is _WAITING for one in _committed())

    def preempted(self) -> bool:
        """As Ray has been told, by the cloud or by ``ray drain-node``."""
        return ray.train.get_preemption_info() is not None

    def best_fid(self) -> float:
        """As Ray Train has been told. Not of one that is still on its way."""
        assert self._measured is not None
        fids = (one.metrics.get(self._measured, math.inf) for one in _committed())
        return min(fids, default=math.inf)

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """Batches streamed by Ray Data, read once for all workers."""
        worker = Worker(self.rank, self.world_size, self._from_rank_zero)
        return ray_batches(stream, worker, start_row, stop_row, batch_rows)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """The last checkpoint, of this attempt or another one, downloaded if need be."""
        # Ray Train learns of one at another moment on each rank.
        self._written.wait()
        dist.barrier(self._writers)
        checkpoint = self._saved or ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)

    def save_checkpoint(self, staged: Staged) -> None:
        """Every rank uploads its part in a thread of Ray Train, which commits the checkpoint."""
        name, _ = staged.parts()[-1]
        store, path = filesystem(join(self._folder_uri, name))
        checkpoint = ray.train.Checkpoint(path, store)
        self._written.clear()
        unmeasured = {self._measured: _UNMEASURED} if self._measured else {}
        ray.train.report(
            staged.record["metrics"] | unmeasured,
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda *_: self._upload(staged, checkpoint),
            delete_local_checkpoint_after_upload=False,
            validation=self._measured is not None,
        )

    def commit_checkpoint(self) -> None:
        """Until the controller has it from all ranks, and has listed it in the run's folder."""
        ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)

    def _upload(self, staged: Staged, checkpoint: Checkpoint) -> Checkpoint:
        try:
            for name, part in staged.parts():
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch.mkdir(parents=True)
                part.write(self._scratch, self._writers)
                upload_folder(self._scratch, join(self._folder_uri, name))
            self._saved = checkpoint
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._written.set()
        return checkpoint

    def _from_rank_zero(self, make: Make) -> list[DataIterator]:
        # A reference, because Train's broadcast is for less than a kilobyte.
        made = {"iterators": ray.put(make())} if self.rank == 0 else None
        iterators: list[DataIterator] = ray.get(broadcast_from_rank_zero(made)["iterators"])
        return iterators


def _committed() -> list[ReportedCheckpoint]:
    """Those that Ray Train knows of and keeps."""
    return ray.train.get_all_reported_checkpoints(
        consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=_ANSWER_SECONDS
    )
