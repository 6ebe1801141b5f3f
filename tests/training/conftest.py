"""A small latent set, and training tasks on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facm_core.autoencoders import load_autoencoder
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_core.objectives import FACMConfig, FlowMatchingConfig
from facm_platform.latents import LatentManifest, LatentStream
from facm_platform.latents.images import image_source
from facm_platform.latents.tables import to_table
from facm_platform.latents.writer import PartLayout, write_part
from facm_platform.registry import ArtifactConfig, save_artifact
from facm_platform.training.config import TrainConfig
from facm_platform.training.task import TrainingTask

ARCHITECTURE = LightningDiTConfig(
    input_size=8,
    in_channels=1,
    patch_size=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=10,
)
TRAIN = TrainConfig(
    images=96,
    global_batch_size=8,
    learning_rate=1e-3,
    warmup_images=16,
    checkpoint_images=32,
    log_images=16,
)
MakeTask = Callable[..., TrainingTask]


@pytest.fixture(scope="session")
def digits_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits as a latent set, written without a cluster."""
    uri = str(tmp_path_factory.mktemp("digits"))
    source, autoencoder = image_source("digits"), load_autoencoder("identity")
    batch = next(source.batches(0, source.rows, source.rows))
    layout = PartLayout(shape=source.image_shape, dtype="float32", num_classes=10)
    rows = to_table(batch.images, batch.labels, batch.keys)
    part, statistics = write_part(uri, "part-00000.parquet", [rows], layout)
    manifest = LatentManifest(
        rows=part.rows,
        latent_shape=layout.shape,
        latent_dtype=layout.dtype,
        num_classes=layout.num_classes,
        mean=tuple(statistics.mean.tolist()),
        std=tuple(statistics.std().tolist()),
        autoencoder_id=autoencoder.id,
        autoencoder_sha256=autoencoder.sha256,
        parts=(part,),
        encoding_sha256="test",
        created_by="test",
    )
    manifest.save(uri)
    return uri


def artifact_config(manifest: LatentManifest, **changes: object) -> ArtifactConfig:
    """Description of a teacher for the set of `manifest`."""
    config = ArtifactConfig(
        role="teacher",
        architecture=ARCHITECTURE,
        objective="flow_matching",
        conditioning="expanded",
        recommended_nfe=(50,),
        normalisation_mean=manifest.mean,
        normalisation_std=manifest.std,
        autoencoder_id=manifest.autoencoder_id,
        autoencoder_sha256=manifest.autoencoder_sha256,
        latent_manifest_sha256=manifest.sha256,
        images_seen=96,
        ema_sigma_rel=0.2,
        config_hash="0" * 16,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def teacher_uri(tmp_path_factory: pytest.TempPathFactory, digits_uri: str) -> str:
    """Artefact of a teacher with random weights (its own initialisation would give zeros)."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) * 0.1
        for name, value in LightningDiT(ARCHITECTURE).state_dict().items()
    }
    folder = tmp_path_factory.mktemp("teacher")
    save_artifact(folder, weights, artifact_config(LatentManifest.load(digits_uri)))
    return str(folder)


@pytest.fixture
def make_task(tmp_path: Path, digits_uri: str, teacher_uri: str) -> MakeTask:
    """``make_task(**changes)`` -> a distillation of 12 steps; ``lanes`` is the world size."""

    def make(lanes: int = 1, teacher: bool = True, **changes: object) -> TrainingTask:
        manifest = LatentManifest.load(digits_uri)
        task = TrainingTask(
            job="distill" if teacher else "pretrain",
            folder_uri=str(tmp_path / "run"),
            stream=LatentStream(uri=digits_uri, manifest=manifest, seed=0, lanes=lanes),
            objective=FACMConfig() if teacher else FlowMatchingConfig(),
            train=TRAIN,
            teacher_uri=teacher_uri if teacher else None,
            artifact=artifact_config(manifest),
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            run_id=None,
        )
        return replace(task, **changes)  # type: ignore[arg-type]

    return make
