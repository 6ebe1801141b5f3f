"""The FID of a run's checkpoints, measured in a process of its own while training goes on."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import safetensors.torch
from ray.train import Checkpoint

from facm_core.metrics import FrechetStatistics, distance_with_error
from facm_platform import storage
from facm_platform.evaluation.engine import Evaluator, Workload
from facm_platform.evaluation.features import load_features
from facm_platform.evaluation.protocol import Protocol
from facm_platform.tracking import MetricSender
from facm_platform.training.config import error_name, fid_name
from facm_platform.training.export import export
from facm_platform.training.task import TrainingTask

VALIDATION = "validation"
"""Folder of a run that holds what was measured."""

# Of the samples, from which the error is told.
_PARTS = 10


def measure(task: TrainingTask, checkpoint: Checkpoint) -> dict[str, float]:
    """FID of a checkpoint's average at each step count, with its standard error.

    Also into MLflow, at its images, and as a file of the run's folder (see `measured`).

    Args:
        task: Whose checkpoint it is; it has a `validation`.
        checkpoint: In the run's folder.
    """
    config, stream = task.validation, task.stream
    assert config is not None
    features = load_features(config.features_uri)
    protocol = Protocol(
        extractor=features.info.name,
        extractor_sha256=features.sha256,
        reference_sha256=stream.manifest.sha256,
        samples=config.samples,
        seed=config.seed,
    )
    workload = Workload(
        protocol=protocol,
        data_uri=stream.uri,
        manifest=stream.manifest,
        features_uri=config.features_uri,
        shown_classes=0,
        shown_samples=0,
        batch_size=config.batch_size,
        device="cuda" if config.gpu else "cpu",
    )
    evaluator = Evaluator(workload)
    folder_uri = storage.join(task.folder_uri, VALIDATION)
    reference_uri = config.reference_uri or folder_uri
    reference = _reference(evaluator, storage.join(reference_uri, f"{protocol.id}.safetensors"))
    edges = [config.samples * part // _PARTS for part in range(_PARTS + 1)]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="facm-validation-") as folder:
        student = str(Path(folder, "student"))
        # Ray's address of it lacks the scheme of the store.
        exported = export(storage.join(task.folder_uri, Path(checkpoint.path).name), student)
        for steps in config.nfe:
            blocks = [evaluator.block(student, steps, *edge) for edge in pairwise(edges)]
            parts = [block.statistics for block in blocks]
            fid, error = distance_with_error(parts, reference)
            found |= {fid_name(steps): fid, error_name(steps): error}
    images_seen = int(exported.metrics["images_seen"])
    if task.run_id is not None:
        spool = Path(tempfile.gettempdir(), "facm_metrics", f"{task.run_id}-validation.jsonl")
        sender = MetricSender(task.tracking_uri, task.run_id, spool)
        sender.send(found, images_seen)
        sender.close()
    kept = json.dumps({"images_seen": images_seen, **found}, indent=2) + "\n"
    storage.write_bytes(storage.join(folder_uri, f"{images_seen:012d}.json"), kept.encode())
    return found


def _reference(evaluator: Evaluator, kept: str) -> FrechetStatistics:
    """Of every row of the latent set; computed once."""
    if storage.exists(kept):
        return FrechetStatistics.from_state_dict(safetensors.torch.load(storage.read_bytes(kept)))
    statistics = evaluator.reference().statistics
    storage.write_bytes(kept, safetensors.torch.save(statistics.state_dict()))
    return statistics


def measured(folder_uri: str) -> list[dict[str, float]]:
    """What `measure` found of a run's checkpoints, in the order of their ``images_seen``."""
    folder = storage.join(folder_uri, VALIDATION)
    names = sorted(name for name in storage.list_files(folder) if name.endswith(".json"))
    return [json.loads(storage.read_text(storage.join(folder, name))) for name in names]
