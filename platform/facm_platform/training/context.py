"""What the training loop asks of the world around it, and an answer without a cluster."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from facm_platform.latents import Batch, LatentStream, local_batches

WriteCheckpoint = Callable[[Path], None]


class WorkerContext(Protocol):
    """One worker's place in a run. The process group is up when the loop gets its context."""

    rank: int
    world_size: int
    device: torch.device

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """This rank's share of the rows [start_row, stop_row), in batches of all ranks together.

        The rows whose number is the rank modulo the world size: `batch_rows` / `world_size` each.
        """

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The last committed checkpoint as a folder, None at the very start."""

    def save_checkpoint(self, metrics: dict[str, float], write: WriteCheckpoint) -> None:
        """Commit a checkpoint: every rank writes its part, all of them or none are kept."""


class LocalContext:
    """A run inside this process: one rank, checkpoints in a folder.

    Args:
        folder: Where checkpoints are kept, ``checkpoint_000001`` and so on.
    """

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """Batches read in this process."""
        return local_batches(stream, start_row, stop_row, batch_rows)

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint of the folder."""
        return nullcontext(max(self.folder.glob("checkpoint_*"), default=None))

    def save_checkpoint(self, metrics: dict[str, float], write: WriteCheckpoint) -> None:
        """Write beside the others, then rename."""
        number = len(list(self.folder.glob("checkpoint_*"))) + 1
        part = Path(tempfile.mkdtemp(dir=self.folder, prefix="part_"))
        write(part)
        shutil.move(part, self.folder / f"checkpoint_{number:06d}")


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, which FSDP2 needs also where nothing is shared."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
