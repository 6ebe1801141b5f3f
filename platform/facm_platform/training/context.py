"""What the training loop asks of the world around it, and an answer without a cluster."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from facm_platform.latents import Batch, LatentStream, local_batches


class Staged(Protocol):
    """A checkpoint that can be written while training goes on (see `StagedState`)."""

    @property
    def record(self) -> dict[str, Any]:
        """What is known of it; ``images_seen`` and ``metrics`` at least."""

    def parts(self) -> Sequence[tuple[str, Staged]]:
        """What is to be written, in this order, each with its folder's name in the run's."""

    def write(self, folder: Path, group: dist.ProcessGroup | None = None) -> None:
        """Write this rank's part; a collective of `group`."""


class WorkerContext(Protocol):
    """One worker's place in a run. The process group is up when the loop gets its context."""

    rank: int
    world_size: int
    device: torch.device

    def moved(self, images_seen: int, doing: str) -> None:
        """This rank gets on: it does this now, after so many images."""

    def publish(self, metrics: dict[str, float]) -> None:
        """Let the monitoring of the cluster see the metrics of the last window."""

    def preempted(self) -> bool:
        """Whether the machine of some rank is about to be taken away. A collective."""

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """This rank's share of the rows [start_row, stop_row), in batches of all ranks together.

        The rows whose number is the rank modulo the world size (see `dealt_to`).
        """

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The last committed checkpoint as a folder, None at the very start."""

    def save_checkpoint(self, staged: Staged) -> None:
        """Begin a checkpoint: every rank writes its part, all of them or none are kept.

        The one before it has been committed. Returns before it is written.
        """

    def commit_checkpoint(self) -> None:
        """Return when the last one that was begun is committed: no kill can undo it."""

    def best_fid(self) -> float:
        """Of the checkpoints measured so far, as this rank knows; infinite without any."""


class LocalContext:
    """A run inside this process: one rank, checkpoints in a folder.

    Args:
        folder: Where checkpoints are kept.
    """

    rank = 0
    world_size = 1

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def moved(self, images_seen: int, doing: str) -> None:
        """Nobody waits for it."""

    def publish(self, metrics: dict[str, float]) -> None:
        """Nobody watches."""

    def preempted(self) -> bool:
        """Nobody would tell."""
        return False

    def best_fid(self) -> float:
        """Nobody measures."""
        return math.inf

    def batches(
        self, stream: LatentStream, start_row: int, stop_row: int, batch_rows: int
    ) -> Iterator[Batch]:
        """Batches read in this process."""
        return local_batches(stream, start_row, stop_row, batch_rows)

    def last_checkpoint(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint of the folder."""
        return nullcontext(max(self.folder.glob("checkpoint_*"), default=None))

    def save_checkpoint(self, staged: Staged) -> None:
        """Write beside the others, then rename."""
        for name, part in staged.parts():
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="part_"))
            part.write(folder)
            (self.folder / name).parent.mkdir(exist_ok=True)
            folder.rename(self.folder / name)

    def commit_checkpoint(self) -> None:
        """It is."""


@contextmanager
def single_process_group() -> Iterator[None]:
    """A process group of this process alone, which FSDP2 needs also where nothing is shared."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
