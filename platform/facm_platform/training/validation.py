"""The FID of a run's checkpoints, measured in a process of its own while training goes on."""

from __future__ import annotations

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
from facm_platform.training.export import export
from facm_platform.training.task import TrainingTask

FID, FID_ERROR = "fid", "fid_error"
"""The metrics: a distance, and its standard error."""

# Of the samples, from which the error is told.
_PARTS = 10


def measure(task: TrainingTask, checkpoint: Checkpoint) -> dict[str, float]:
    """FID of a checkpoint's average, with its standard error; also into MLflow, at its images.

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
    kept = storage.join(task.folder_uri, "validation", f"{protocol.id}.safetensors")
    reference = _reference(evaluator, kept)
    with tempfile.TemporaryDirectory(prefix="facm-validation-") as folder:
        student = str(Path(folder, "student"))
        # Ray's address of it lacks the scheme of the store.
        exported = export(storage.join(task.folder_uri, Path(checkpoint.path).name), student)
        edges = [config.samples * part // _PARTS for part in range(_PARTS + 1)]
        parts = [evaluator.block(student, config.nfe, *edge).statistics for edge in pairwise(edges)]
    fid, error = distance_with_error(parts, reference)
    found = {FID: fid, FID_ERROR: error}
    if task.run_id is not None:
        spool = Path(tempfile.gettempdir(), "facm_metrics", f"{task.run_id}-validation.jsonl")
        sender = MetricSender(task.tracking_uri, task.run_id, spool)
        sender.send(found, int(exported.metrics["images_seen"]))
        sender.close()
    return found


def _reference(evaluator: Evaluator, kept: str) -> FrechetStatistics:
    """Of every row of the latent set; computed once a run."""
    if storage.exists(kept):
        return FrechetStatistics.from_state_dict(safetensors.torch.load(storage.read_bytes(kept)))
    statistics = evaluator.reference().statistics
    storage.write_bytes(kept, safetensors.torch.save(statistics.state_dict()))
    return statistics
