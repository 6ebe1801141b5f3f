"""A model artefact out of a checkpoint: any of the averages it holds, or one that it does not."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from facm_core.ema import synthesis_weights
from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.config import JobResult
from facm_platform.registry import ArtifactConfig, upload_artifact, write_artifact
from facm_platform.storage.listing import iter_names
from facm_platform.training.checkpoint import AVERAGES, PlainReader, check_files, read_record
from facm_platform.training.config import LoraConfig
from facm_platform.training.lora import merged


@dataclass(frozen=True)
class _Stored:
    """A checkpoint, or the averages that one left, on this machine."""

    folder: Path
    record: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.record["images_seen"])

    @property
    def lora(self) -> LoraConfig | None:
        values = self.record["lora"]
        return values and LoraConfig(**values)

    @property
    def snapshots(self) -> list[tuple[int, float]]:
        return [(self.images_seen, float(name)) for name in self.record["sigma_rels"]]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All those whose name begins so, by the rest of their name."""
        stored = PlainReader(self.folder).read_metadata().state_dict_metadata
        wanted = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        load(wanted, storage_reader=PlainReader(self.folder), no_dist=True)
        return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


def export(checkpoint: str, output: str, sigma_rel: float | None = None) -> JobResult:
    """Write the model artefact of a checkpoint.

    Args:
        checkpoint: Its folder, ``checkpoint_…`` in the folder of a run.
        output: Empty folder, or ``s3://`` address, for the artefact.
        sigma_rel: Width of the average. One that was not tracked is put together from the averages
            that this checkpoint and those before it have left (EDM2, section 3.2). None: the one
            that the run exports.

    Raises:
        InvalidInputError: no whole checkpoint there, a place that is not empty, or no average of
            that width.
    """
    uri = storage.absolute(checkpoint, "checkpoint")
    target = storage.empty_folder(output, "output")
    with _stored(uri) as last:
        artifact = ArtifactConfig.from_json(last.record["artifact"])
        sigma_rel = artifact.ema_sigma_rel if sigma_rel is None else sigma_rel
        if (last.images_seen, sigma_rel) in last.snapshots:
            averages = last.tensors(f"ema.{sigma_rel}.")
        else:
            averages = _synthesised(uri, last, sigma_rel)
        student = last.tensors("student.")
    artifact = replace(artifact, ema_sigma_rel=sigma_rel)
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder), merged({**student, **averages}, last.lora), artifact)
        upload_artifact(Path(folder), target)
    images = float(artifact.images_seen)
    return JobResult(
        run_id=None,
        run_name="export",
        artifact_uri=target,
        metrics={"images_seen": images, "ema_sigma_rel": sigma_rel},
    )


def _synthesised(uri: str, last: _Stored, sigma_rel: float) -> dict[str, Tensor]:
    """The average of that width at the checkpoint `last`, from all there is of its run."""
    run, _, name = uri.rpartition("/")
    with ExitStack() as stack:
        names = (folder.rstrip("/") for folder in iter_names(storage.join(run, AVERAGES)))
        before = sorted(other for other in names if other < name)
        kept = [stack.enter_context(_stored(storage.join(run, AVERAGES, n))) for n in before]
        snapshots = [(stored, one) for stored in (*kept, last) for one in stored.snapshots]
        weights = synthesis_weights([one for _, one in snapshots], last.images_seen, sigma_rel)
        # Far from 1, the snapshots are too few or too narrow for this width.
        total = math.fsum(weights)
        require(
            abs(total - 1) < 0.1,
            "sigma_rel",
            sigma_rel,
            f"{len(snapshots)} averages of the run do not make one of this width: their weights "
            f"add up to {total:.2f}, not 1",
            f"Use one of {sorted({width for _, (_, width) in snapshots})}, or a later checkpoint",
        )
        mixture: dict[str, Tensor] = {}
        for weight, (stored, (_, width)) in zip(weights.tolist(), snapshots, strict=True):
            for key, value in stored.tensors(f"ema.{width}.").items():
                mixture[key] = mixture.get(key, 0) + weight * value.double()
        return mixture


@contextmanager
def _stored(uri: str) -> Iterator[_Stored]:
    """What lies at `uri`, whole."""
    try:
        with storage.local_copy(uri) as folder:
            record = read_record(folder)
            check_files(folder, record, record["files"], uri)
            yield _Stored(folder, record)
    except FileNotFoundError as error:
        remedy = "Give a folder checkpoint_… of a run"
        raise InvalidInputError("checkpoint", uri, "there is no such folder", remedy) from error
