"""A small world to evaluate and to search in: digits, fitted features, a teacher and a student."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from facm_platform.evaluation.features import FeaturesInfo, save_features
from facm_platform.evaluation.fit import fit
from facm_platform.latents import LatentManifest
from tests.small import ARCHITECTURE, artifact_config, write_digits, write_model


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

    def options(self, name: str, root: Path) -> list[str]:
        """Of a job that distills, with its runs below `root`."""
        return [
            f"run.name={name}",
            f"run.storage_uri={root}",
            f"run.tracking.uri=sqlite:///{root}/mlflow.db",
            f"data.uri={self.data}",
            f"teacher.uri={self.teacher}",
            "train.global_batch_size=8",
        ]


def write_features(features: Path, data: Path, manifest: LatentManifest, epochs: int = 5) -> float:
    """Fit an extractor to the digits of `data`; returns its accuracy."""
    channels, size, _ = manifest.latent_shape
    info = FeaturesInfo(
        name="digits",
        channels=channels,
        size=size,
        num_classes=10,
        test_accuracy=0.0,
        latent_manifest_sha256=manifest.sha256,
    )
    network, accuracy = fit(str(data), manifest, info, epochs=epochs, seed=0)
    save_features(str(features), network, info)
    return accuracy


def write_world(folder: Path) -> World:
    """Features are fitted for five epochs, teacher and student random."""
    manifest = write_digits(folder / "digits")
    accuracy = write_features(folder / "features", folder / "digits", manifest)
    config = artifact_config(
        manifest, architecture=replace(ARCHITECTURE, depth=1), guidance_scale=1.5
    )
    teacher = write_model(folder / "teacher", config, seed=1)
    student = replace(
        config, role="student", objective="facm", guidance_scale=1.0, teacher_sha256=teacher
    )
    write_model(folder / "student", student, seed=2)
    return World(folder, manifest, accuracy)
