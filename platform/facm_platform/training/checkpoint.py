"""The state of a run, and its form on disk: torch DCP shards and one JSON file.

Nothing read from storage is executed: tensors are read with ``weights_only``, and DCP's own
metadata file, a pickle, through an unpickler that knows DCP's plain record types only.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import optim
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from facm_core.ema import PowerEMA
from facm_core.models import LightningDiT

PROGRESS = "progress.json"
_PROGRESS_FIELDS = ("images_seen", "skipped_steps", "metrics")

_RECORDS = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch", "float32"),
    ("torch", "float64"),
    ("torch", "bfloat16"),
    ("torch", "int64"),
    ("torch", "strided"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


@dataclass
class TrainState:
    """What a run is between two steps.

    Random numbers and the data position are functions of (seed, images_seen): they need no state
    of their own.

    Attributes:
        student: Sharded network under training.
        optimizer: Its optimizer.
        ema: Its averages.
        images_seen: Images trained on.
        skipped_steps: Steps whose loss or gradient was not finite.
        metrics: Of the last log window.
    """

    student: LightningDiT
    optimizer: optim.Optimizer
    ema: PowerEMA
    images_seen: int = 0
    skipped_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path, rank: int) -> None:
        """Write this rank's shards; rank 0 adds the metadata."""
        save(self._tensors()[0], checkpoint_id=folder)
        if rank == 0:
            progress = {name: getattr(self, name) for name in _PROGRESS_FIELDS}
            (folder / PROGRESS).write_text(json.dumps(progress))

    def read(self, folder: Path) -> None:
        """Continue where a checkpoint left off; any number of ranks may read it."""
        state, groups = self._tensors()
        load(state, storage_reader=PlainReader(folder))
        set_state_dict(
            self.student,
            self.optimizer,
            model_state_dict=state["student"],
            optim_state_dict={"state": state["optimizer"], "param_groups": groups},
        )
        progress = json.loads((folder / PROGRESS).read_text())
        for name in _PROGRESS_FIELDS:
            setattr(self, name, progress[name])

    def _tensors(self) -> tuple[dict[str, Any], Any]:
        """What is stored, tensors only; and the optimizer's settings, which the recipe holds."""
        student, optimizer = get_state_dict(self.student, self.optimizer)
        state = {"student": student, "optimizer": optimizer["state"], "ema": self.ema.profiles}
        return state, optimizer["param_groups"]


class PlainReader(FileSystemReader):
    """DCP's reader of a folder, with metadata that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata."""
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata: Metadata = _RecordUnpickler(io.BytesIO(content)).load()
        # As the base class does: which load this is, for its logs.
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"checkpoint metadata names {module}.{name}: refused")
        return super().find_class(module, name)
