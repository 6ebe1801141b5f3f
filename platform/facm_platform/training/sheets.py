"""Samples of a run's checkpoints and of its teacher, from the same noise, as pictures in MLflow."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from mlflow.exceptions import MlflowException
from requests import RequestException

from facm_core.models import Condition
from facm_core.models.base import select_rows
from facm_core.pixels import quantise
from facm_platform.evaluation.measured import Shown
from facm_platform.evaluation.protocol import SEED_STRIDE
from facm_platform.evaluation.real import DecodedSet
from facm_platform.evaluation.sheet import Group, draw_sheet
from facm_platform.latents import LatentManifest
from facm_platform.latents.autoencoder import autoencoder_of
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import latent_sampler
from facm_platform.tracking import new_client
from facm_platform.tracking.reading import list_artifacts
from facm_platform.training.task import TrainingTask

logger = logging.getLogger(__name__)

SHEETS = "samples"
"""Artifact folder of a run: ``student_nfe1_images000000025600.png``, ``teacher_nfe50.png``."""
SHEET_CLASSES = 10

ShownBySteps = dict[int, Shown]


def sheet_samples(manifest: LatentManifest) -> int:
    """Images of a class on a sheet; of a row with a text there is one."""
    return 3 if manifest.num_classes else 1


def log_sheets(task: TrainingTask, images_seen: int, shown: ShownBySteps) -> None:
    """Draw what a checkpoint makes, and once what the teacher makes of the same noise.

    A tracking server that is away costs the pictures, not the run.

    Args:
        task: Has a run in MLflow.
        images_seen: Of the checkpoint.
        shown: Its images, by steps.
    """
    assert task.run_id is not None
    client, columns = new_client(task.tracking_uri), sheet_samples(task.stream.manifest)
    try:
        with tempfile.TemporaryDirectory(prefix="facm-sheets-") as folder:
            for steps, images in shown.items():
                name = f"student_nfe{steps}_images{images_seen:012d}.png"
                _draw(Path(folder, name), "student", steps, images, columns)
            known = list_artifacts(client, task.run_id, SHEETS)
            if task.teacher_uri is not None and not any("/teacher" in name for name in known):
                steps, images = _of_teacher(task, next(iter(shown.values())))
                _draw(Path(folder, f"teacher_nfe{steps}.png"), "teacher", steps, images, columns)
            client.log_artifacts(task.run_id, folder, SHEETS)
    except (MlflowException, RequestException, OSError) as error:
        logger.warning("the samples at %d images are not in MLflow: %s", images_seen, error)


def _of_teacher(task: TrainingTask, like: Shown) -> tuple[int, Shown]:
    """Its steps and its images of the noise and the labels or texts that the student got."""
    assert task.teacher_uri is not None
    assert task.validation is not None
    manifest, validation = task.stream.manifest, task.validation
    device = torch.device("cuda" if validation.gpu else "cpu")
    artifact = load_artifact(task.teacher_uri)
    steps = max(artifact.config.recommended_nfe)
    sample = latent_sampler(artifact, device, torch.float32)
    # With balanced labels, sample i has label i mod classes; of a row with a text there is one.
    indices = [number * manifest.num_classes + label for label, number in like]
    seeds = [validation.seed * SEED_STRIDE + index for index in indices]
    with torch.no_grad():
        latents = sample(seeds, _condition(task, [label for label, _ in like]), steps)
        images = quantise(autoencoder_of(manifest).to(device, torch.float32).decode(latents)).cpu()
    return steps, dict(zip(like, images, strict=True))


def _condition(task: TrainingTask, labels: list[int]) -> Condition:
    """These labels, or the texts of these rows."""
    manifest, rows = task.stream.manifest, max(labels) + 1
    if manifest.num_classes:
        return torch.tensor(labels)
    (texts,) = DecodedSet(task.stream.uri, manifest).conditions(0, rows, rows)
    return select_rows(texts, torch.tensor(labels))


def _draw(path: Path, heading: str, steps: int, images: Shown, columns: int) -> None:
    subheading = f"{steps} step" if steps == 1 else f"{steps} steps"
    classes = 1 + max(label for label, _ in images)
    draw_sheet(path, [Group(heading, subheading, images)], classes, columns)
