"""The FID of a run's checkpoints, measured in a process of its own while training goes on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from ray.train import Checkpoint

from facm_core.metrics import distance_with_error
from facm_platform import storage
from facm_platform.evaluation.engine import Evaluator, View, Workload
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.evaluation.protocol import Protocol, label_policy
from facm_platform.evaluation.reference import find_reference, reference_name
from facm_platform.tracking import MetricSender
from facm_platform.training.config import error_name, fid_name
from facm_platform.training.export import export
from facm_platform.training.sheets import (
    SHEET_CLASSES,
    ShownBySteps,
    log_sheets,
    sheet_samples,
)
from facm_platform.training.task import TrainingTask

VALIDATION = "validation"
"""Folder of a run that holds what was measured."""


def measure(task: TrainingTask, checkpoint: Checkpoint) -> dict[str, float]:
    """Distances of a checkpoint, see `distances`; also into MLflow, and as a file (`measured`).

    Args:
        task: Whose checkpoint it is; it has a `validation`.
        checkpoint: In the run's folder.
    """
    # Ray's address of it lacks the scheme of the store.
    uri = storage.join(task.folder_uri, Path(checkpoint.path).name)
    shown: ShownBySteps = {}
    images_seen, found = distances(task, uri, shown=shown)
    if task.run_id is not None:
        log_sheets(task, images_seen, shown)
        spool = Path(tempfile.gettempdir(), "facm_metrics", f"{task.run_id}-validation.jsonl")
        sender = MetricSender(task.tracking_uri, task.run_id, spool)
        sender.send(found, images_seen)
        sender.close()
    kept = json.dumps({"images_seen": images_seen, **found}, indent=2) + "\n"
    file = storage.join(task.folder_uri, VALIDATION, f"{images_seen:012d}.json")
    storage.write_bytes(file, kept.encode())
    return found


def measured(folder_uri: str, skip: int = 0) -> list[dict[str, float]]:
    """What `measure` found of a run's checkpoints, in the order of their ``images_seen``.

    Args:
        folder_uri: The run's.
        skip: So many are known already.
    """
    folder = storage.join(folder_uri, VALIDATION)
    names = sorted(name for name in storage.list_files(folder) if name.endswith(".json"))
    return [json.loads(storage.read_text(storage.join(folder, name))) for name in names[skip:]]


def distances(
    task: TrainingTask,
    checkpoint_uri: str,
    sigma_rel: float | None = None,
    shown: ShownBySteps | None = None,
) -> tuple[int, dict[str, float]]:
    """FID of a checkpoint's average at each step count, each with its standard error.

    Args:
        task: Whose checkpoint it is; it has a `validation`.
        checkpoint_uri: Its folder.
        sigma_rel: Width of the average, see `export`.
        shown: Takes some of the images, by steps.

    Returns:
        The images seen, and the metrics.
    """
    config, stream = task.validation, task.stream
    assert config is not None
    extractor = load_extractor(config.extractor, config.features_uri)
    name = reference_name(extractor, stream.manifest)
    kept_uri = storage.join(task.folder_uri, VALIDATION, name)
    file = find_reference(config.reference_uri or kept_uri, extractor, stream.manifest)
    protocol = Protocol(
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        reference_sha256=file.sha256,
        samples=config.samples,
        seed=config.seed,
        label_policy=label_policy(stream.manifest, None),
        resize=extractor.resize,
        precision=extractor.precision,
    )
    workload = Workload(
        protocol=protocol,
        data_uri=stream.uri,
        manifest=stream.manifest,
        view=View(
            kind=config.extractor,
            features_uri=extractor.uri,
            shown_classes=0 if shown is None else SHEET_CLASSES,
            shown_samples=0 if shown is None else sheet_samples(stream.manifest),
            # Of those that may make the reference, which others may share.
            keep=protocol.kept_features,
            batch_size=config.batch_size,
            gpu=config.gpu,
        ),
    )
    evaluator = Evaluator(workload)
    reference = evaluator.reference(file).gaussian
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="facm-validation-") as folder:
        student = str(Path(folder, "student"))
        exported = export(checkpoint_uri, student, sigma_rel)
        for steps in config.nfe:
            blocks = [evaluator.block(student, steps, *edge) for edge in workload.parts()]
            fid, error = distance_with_error([block.statistics for block in blocks], reference)
            found |= {fid_name(steps): fid, error_name(steps): error}
            if shown is not None:
                shown[steps] = {key: one for block in blocks for key, one in block.shown.items()}
    return int(exported.metrics["images_seen"]), found
