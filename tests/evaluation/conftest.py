"""A small world to evaluate in: the digits, fitted features, a teacher and a student."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from facm_core.autoencoders import load_autoencoder
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_platform.evaluation.features import FeaturesInfo, save_features
from facm_platform.evaluation.fit import fit
from facm_platform.latents import LatentManifest
from facm_platform.latents.images import image_source
from facm_platform.latents.tables import to_table
from facm_platform.latents.writer import PartLayout, part_name, write_part
from facm_platform.registry import ArtifactConfig, save_artifact


def write_digits(folder: Path, rows: int = 1797) -> LatentManifest:
    """The first `rows` digits as a latent set, as jobs/encode.py would write it."""
    source, autoencoder = image_source("digits"), load_autoencoder("identity")
    layout = PartLayout(shape=source.image_shape, dtype="float32", num_classes=source.num_classes)
    tables: list[pa.Table] = [
        to_table(batch.images, batch.labels, batch.keys) for batch in source.batches(0, rows, 500)
    ]
    part, statistics = write_part(str(folder), part_name(0), tables, layout)
    manifest = LatentManifest(
        rows=rows,
        latent_shape=source.image_shape,
        latent_dtype="float32",
        num_classes=source.num_classes,
        mean=tuple(statistics.mean.tolist()),
        std=tuple(statistics.std().tolist()),
        autoencoder_id=autoencoder.id,
        autoencoder_sha256=autoencoder.sha256,
        parts=(part,),
        encoding_sha256="0" * 64,
        created_by="test",
    )
    manifest.save(str(folder))
    return manifest


def write_model(
    folder: Path, manifest: LatentManifest, *, seed: int, role: str, teacher: str | None = None
) -> str:
    """A random network that does something; returns the hash of its weights."""
    architecture = LightningDiTConfig(
        input_size=8,
        in_channels=1,
        patch_size=4,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=manifest.num_classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = LightningDiT(architecture).state_dict()
        # The initial network gives zero everywhere.
        weights |= {
            name: torch.randn_like(value) * 0.3
            for name, value in weights.items()
            if "adaLN" in name or "final_layer.linear" in name
        }
    config = ArtifactConfig(
        role=role,
        architecture=architecture,
        objective="facm" if role == "student" else "flow_matching",
        conditioning="expanded",
        guidance_scale=1.0 if role == "student" else 1.5,
        recommended_nfe=(1, 2),
        normalisation_mean=manifest.mean,
        normalisation_std=manifest.std,
        autoencoder_id=manifest.autoencoder_id,
        autoencoder_sha256=manifest.autoencoder_sha256,
        latent_manifest_sha256=manifest.sha256,
        teacher_sha256=teacher,
        images_seen=1000,
        ema_sigma_rel=0.05,
        config_hash="0" * 16,
    )
    return save_artifact(folder, weights, config)


@dataclass(frozen=True)
class World:
    """Folders of everything an evaluation needs."""

    folder: Path
    manifest: LatentManifest
    accuracy: float

    @property
    def data(self) -> str:
        return str(self.folder / "digits")

    @property
    def features(self) -> str:
        return str(self.folder / "features")

    @property
    def teacher(self) -> str:
        return str(self.folder / "teacher")

    @property
    def student(self) -> str:
        return str(self.folder / "student")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Digits, features (fitted for five epochs), a teacher and its student, both random."""
    folder = tmp_path_factory.mktemp("world")
    manifest = write_digits(folder / "digits")
    info = FeaturesInfo(
        name="digits",
        channels=1,
        size=8,
        num_classes=10,
        test_accuracy=0.0,
        latent_manifest_sha256=manifest.sha256,
    )
    network, accuracy = fit(str(folder / "digits"), manifest, info, epochs=5, seed=0)
    save_features(str(folder / "features"), network, info)
    teacher = write_model(folder / "teacher", manifest, seed=1, role="teacher")
    write_model(folder / "student", manifest, seed=2, role="student", teacher=teacher)
    return World(folder, manifest, accuracy)
