"""The training loop's world under Ray Train: rank, device, data, checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import ray.train
import ray.train.torch
from ray.data import DataIterator
from ray.train.collective import broadcast_from_rank_zero

from facm_platform.latents import Batch, LatentStream
from facm_platform.latents.source import Make, Worker, ray_batches
from facm_platform.training.context import WriteCheckpoint


class RayContext:
    """One Ray Train worker. To be made inside the worker's train function."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = ray.train.torch.get_device()

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """Batches streamed by Ray Data, read once for all workers."""
        worker = Worker(self.rank, self.world_size, self._from_rank_zero)
        return ray_batches(stream, worker, start_row, stop_row, batch_rows)

    @contextmanager
    def last_checkpoint(self) -> Iterator[Path | None]:
        """The last checkpoint that Ray Train committed, downloaded if need be."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)

    def save_checkpoint(self, metrics: dict[str, float], write: WriteCheckpoint) -> None:
        """Every rank reports a folder with its part; Ray Train merges and commits them."""
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(metrics, checkpoint=checkpoint)

    def _from_rank_zero(self, make: Make) -> list[DataIterator]:
        # A reference, because Train's broadcast is for less than a kilobyte.
        made = {"iterators": ray.put(make())} if self.rank == 0 else None
        iterators: list[DataIterator] = ray.get(broadcast_from_rank_zero(made)["iterators"])
        return iterators
