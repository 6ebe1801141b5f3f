"""The state of a run, and its form on storage: torch DCP shards and a record of them.

A checkpoint is a folder to which every rank contributed. ``checkpoint.json`` names all other files
with their SHA-256, so that a folder half written, or damaged later, is never taken for one.

Nothing read from storage is executed: tensors are read with ``weights_only``, and DCP's own
metadata file, a pickle, through an unpickler that knows DCP's plain record types only.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from facm_core.ema import PowerEMA
from facm_core.errors import InvalidInputError, require
from facm_core.models import Network
from facm_platform import storage
from facm_platform.registry import ArtifactConfig
from facm_platform.training.config import LoraConfig
from facm_platform.training.parallel import Group, agreed, differing_replicas

RECORD = "checkpoint.json"
AVERAGES = "averages"
"""Folder of a run in which the averages of every checkpoint stay when the checkpoint goes."""

_FORMAT = 1
_RESTORE = "Restore the file from a copy, or train under another run.name"
_PROGRESS = ("images_seen", "skipped_steps", "rollbacks", "metrics")

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

    Random numbers and the data position are functions of (seed, images_seen, rollbacks): they need
    no state of their own.

    Attributes:
        trained: All that the optimizer changes: the sharded ``student``, and the ``objective``
            where that has parameters of its own.
        optimizer: Its optimizer.
        ema: Averages of the student.
        images_seen: Images trained on.
        skipped_steps: Steps whose loss or gradient was not finite.
        rollbacks: How often the run went back to a checkpoint because it diverged.
        metrics: Of the last log window.
    """

    trained: nn.ModuleDict
    optimizer: optim.Optimizer
    ema: PowerEMA
    images_seen: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=cuda,
            )
        )

    @property
    def student(self) -> Network:
        """The network under training."""
        return cast(Network, self.trained["student"])

    def staged(
        self, artifact: ArtifactConfig, keep_averages: bool, lora: LoraConfig | None
    ) -> StagedState:
        """A copy in this machine's memory, for writing while training goes on.

        The next one takes its place: write this one before.

        Args:
            artifact: What the averages of this state are as models.
            keep_averages: See `StagedState`.
            lora: The student's adapters.
        """
        tensors: Any = self._stager.stage(self._tensors()[0])
        record = {name: getattr(self, name) for name in _PROGRESS}
        record |= {"sigma_rels": list(self.ema.profiles), "artifact": artifact.to_json()}
        record["lora"] = lora and asdict(lora)
        return StagedState(tensors, record, keep_averages)

    def read(self, folder: Path, group: Group = None) -> None:
        """Continue where a checkpoint left off; any number of ranks may read it, all of them do.

        Raises:
            InvalidInputError: the same on every rank; not a checkpoint, a file is missing or
                damaged, or it is of another network.
        """
        state, groups = self._tensors()
        record = agreed(lambda: self._checked(folder, state, group), group)
        load(state, storage_reader=PlainReader(folder), process_group=group)
        set_state_dict(
            self.trained,
            self.optimizer,
            model_state_dict={n: t for n, t in state.items() if isinstance(t, Tensor)},
            optim_state_dict={"state": state["optimizer"], "param_groups": groups},
        )
        for name in _PROGRESS:
            setattr(self, name, record[name])

    def _checked(self, folder: Path, state: Mapping[str, Any], group: Group) -> dict[str, Any]:
        record = read_record(folder)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        check_files(folder, record, sorted(record["files"])[rank::ranks], str(folder))
        check_tensors(folder, dict(_flat(state)))
        return record

    def _tensors(self) -> tuple[dict[str, Any], Any]:
        """What is stored, tensors only; and the optimizer's settings, which the recipe holds."""
        trained, optimizer = get_state_dict(self.trained, self.optimizer)
        state = {**trained, "optimizer": optimizer["state"], "ema": self.ema.profiles}
        return state, optimizer["param_groups"]


@dataclass(frozen=True)
class StagedState:
    """A checkpoint that is not written yet.

    Attributes:
        tensors: This rank's shards, by name.
        record: What ``checkpoint.json`` will hold besides the files.
        keep_averages: Whether the averages stay when the checkpoint goes.
    """

    tensors: dict[str, Any]
    record: dict[str, Any]
    keep_averages: bool = False

    def parts(self) -> list[tuple[str, StagedState]]:
        """Folder and content: the averages that stay, and the checkpoint, which makes it count."""
        name = f"checkpoint_{self.record['images_seen']:012d}"
        averages = StagedState({"ema": self.tensors["ema"]}, self.record)
        return [(f"{AVERAGES}/{name}", averages)] * self.keep_averages + [(name, self)]

    def write(self, folder: Path, group: Group = None) -> None:
        """Write this rank's files; rank 0 adds the metadata and the record. A collective."""
        differing = differing_replicas(dict(_flat(self.tensors)), group)
        if differing:
            raise RuntimeError(f"the ranks {differing} hold other weights than their replicas")
        writer = FileSystemWriter(folder, sync_files=False)
        save(self.tensors, storage_writer=writer, process_group=group)
        mine = {file.name: _described(file) for file in folder.iterdir()}
        everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(everyone, mine, group)
        if dist.get_rank(group) == 0:
            files = {name: file for of_rank in everyone for name, file in of_rank.items()}
            record = {"format": _FORMAT, **self.record, "files": files}
            (folder / RECORD).write_text(json.dumps(record, indent=1))


def check_stored(uri: str) -> None:
    """Look at a checkpoint before a job starts: at every file, and at every byte of a small one.

    Raises:
        InvalidInputError: there is none, or a file is missing or damaged.
    """
    found = storage.list_files(uri)
    remedy = "Put it back, or train under another run.name"
    require(RECORD in found, "checkpoint", uri, f"it has no {RECORD}", remedy)
    with storage.local_copy(storage.join(uri, RECORD)) as file:
        record = read_record(file.parent)
    wanted = {name: file["bytes"] for name, file in record["files"].items()}
    for name, size in wanted.items():
        problem = f"missing or damaged: {found.get(name)} bytes, where {RECORD} says {size}"
        require(found.get(name) == size, "checkpoint", storage.join(uri, name), problem, _RESTORE)
    if sum(wanted.values()) <= storage.SMALL_BYTES:
        with storage.local_copy(uri) as folder:
            check_files(folder, record, wanted, uri)


def read_record(folder: Path) -> dict[str, Any]:
    """What ``checkpoint.json`` says.

    Raises:
        InvalidInputError: there is none, or one of another format.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            "checkpoint",
            str(folder),
            f"no {RECORD} that can be read ({error}): not a checkpoint, or half of one",
            "Give a folder checkpoint_… of a run",
        ) from error
    require(
        version == _FORMAT,
        "checkpoint",
        str(folder),
        f"its format is {version}, this code reads {_FORMAT}",
        "Use the code that wrote it",
    )
    return record


def check_files(folder: Path, record: Mapping[str, Any], names: Iterable[str], uri: str) -> None:
    """Raise `InvalidInputError` unless the files of those `names` are what the record says.

    It names them by the address `uri`, of which `folder` may be a copy.
    """
    for name in names:
        found = _described(folder / name) if (folder / name).is_file() else None
        require(
            found == record["files"][name],
            "checkpoint",
            storage.join(uri, name),
            f"missing or damaged: {found}, where {RECORD} says {record['files'][name]}",
            _RESTORE,
        )


def check_tensors(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Raise `InvalidInputError` unless the checkpoint holds tensors of those names and shapes."""
    stored = PlainReader(folder).read_metadata().state_dict_metadata
    findings = [f"missing {name}" for name in expected if name not in stored]
    findings += [f"unexpected {name}" for name in stored if name not in expected]
    for name in expected.keys() & stored.keys():
        entry, wanted = stored[name], tuple(expected[name].shape)
        if isinstance(entry, TensorStorageMetadata) and tuple(entry.size) != wanted:
            findings.append(f"{name} is {tuple(entry.size)}, not {wanted}")
    require(
        not findings,
        "checkpoint",
        str(folder),
        "it is of another network or recipe: " + "; ".join(sorted(findings)),
        "Use the recipe that it was trained with",
    )


class PlainReader(FileSystemReader):
    """DCP's reader of a folder, with metadata that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's metadata.

        Raises:
            InvalidInputError: it names anything but the records that DCP writes.
        """
        content = (Path(self.path) / ".metadata").read_bytes()
        try:
            metadata: Metadata = _RecordUnpickler(io.BytesIO(content)).load()
        except pickle.UnpicklingError as error:
            raise InvalidInputError(
                "checkpoint", str(self.path), str(error), "Never load it: it is forged"
            ) from error
        # As the base class does: which load this is, for its logs.
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"its metadata names {module}.{name}: refused")
        return super().find_class(module, name)


def _flat(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names that DCP gives them."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _described(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": storage.file_sha256(file)}
