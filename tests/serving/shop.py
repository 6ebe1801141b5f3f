"""A registered model to serve, and what it must draw: plain PyTorch, one sample at a time."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from facm_core.models import LightningDiT, LightningDiTConfig
from facm_core.samplers import sample_consistency, sample_noise
from facm_platform.latents import LatentManifest
from facm_platform.registry import ArtifactConfig
from facm_platform.registry.pyfunc import pyfunc_files
from facm_platform.registry.versions import CHAMPION, Version, register_version
from facm_platform.tracking import Store, TrackingConfig, open_run
from tests.small import ARCHITECTURE, artifact_config, write_digits, write_model

MODEL = "digits"


@dataclass
class Shop:
    """A registry with a model of the digits, random weights."""

    store: Store
    folder: Path
    manifest: LatentManifest
    architecture: LightningDiTConfig = ARCHITECTURE
    versions: dict[str, Version] = field(default_factory=dict)

    @property
    def config(self) -> ArtifactConfig:
        return artifact_config(
            self.manifest, role="student", objective="facm", architecture=self.architecture
        )

    def register(self, seed: int) -> Version:
        """A new version with weights of that seed."""
        folder = self.folder / f"artifact-{seed}"
        sha256 = write_model(folder, self.config, seed=seed)
        run = open_run(self.store, "r", job="evaluate", config=TrackingConfig())
        run.log_artifact(folder, "model")
        with pyfunc_files(self.config) as more:
            run.log_artifact(more, "model")
        tags = {"model_sha256": sha256, "fid_nfe1": "1.0", "protocol_id": "p"}
        version = register_version(run, MODEL, "model", tags, "a test")
        self.versions[version.number] = version
        return version

    def promote(self, version: Version) -> None:
        self.store.client.set_registered_model_alias(MODEL, CHAMPION, version.number)

    def weights(self, version: str) -> Path:
        return Path(self.versions[version].source.removeprefix("file://")) / "model.safetensors"

    def pixels(self, version: str, label: int, seed: int, steps: int = 1) -> np.ndarray:
        """What that version draws, uint8 (H, W)."""
        model = _model(self.weights(version), self.config)
        noise = sample_noise((1, 8, 8), [seed]).double()
        x = sample_consistency(model, noise, torch.tensor([label]), steps=steps, seeds=[seed])
        x = x[0, 0] * self.manifest.std[0] + self.manifest.mean[0]
        return np.round((x.numpy().astype(np.float32).clip(-1, 1) + 1) * 127.5).astype(np.uint8)

    def pngs(self, version: str, label: int, seed: int, count: int, steps: int) -> list[bytes]:
        """Those of a request."""
        return [self.png(version, label, seed + k, steps) for k in range(count)]

    def png(self, version: str, label: int, seed: int, steps: int = 1) -> bytes:
        """The same as a file."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels(version, label, seed, steps)).save(buffer, "PNG")
        return buffer.getvalue()


def open_shop(store: Store, folder: Path, architecture: LightningDiTConfig = ARCHITECTURE) -> Shop:
    """Two versions, of which the first is the champion."""
    shop = Shop(store, folder, write_digits(folder / "digits", rows=200), architecture)
    shop.promote(shop.register(seed=1))
    shop.register(seed=2)
    return shop


@cache
def _model(weights: Path, config: ArtifactConfig) -> LightningDiT:
    model = LightningDiT(config.architecture)
    model.load_state_dict(load_file(weights))
    return model.double().eval()
