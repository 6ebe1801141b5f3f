"""A small world: the digits as a latent set, and model artefacts with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits

from facm_core.autoencoders import load_autoencoder
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.manifest import part_name
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from facm_platform.registry import ArtifactConfig, save_artifact

ARCHITECTURE = LightningDiTConfig(
    input_size=8,
    in_channels=1,
    patch_size=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=10,
)


def write_digits(folder: Path, rows: int = 1797, channels: int = 1) -> LatentManifest:
    """The first `rows` digits as a latent set, as jobs/encode.py would write it; grey all over."""
    format = RowFormat(latent_shape=(channels, 8, 8), latent_dtype="float32", num_classes=10)
    pixels, labels = load_digits(return_X_y=True)
    table = format.table(
        {
            "latent": pixels[:rows].reshape(rows, 1, 8, 8).repeat(channels, axis=1) / 8 - 1,
            "label": labels[:rows],
            "key": [f"digits/{row:05d}" for row in range(rows)],
        }
    )
    autoencoder = load_autoencoder("identity")
    manifest = LatentManifest.of(
        format,
        [write_part(str(folder), part_name(0), [table], format)],
        autoencoder_id=autoencoder.id,
        autoencoder_sha256=autoencoder.sha256,
        encoding_sha256="0" * 64,
        created_by="test",
    )
    manifest.save(str(folder))
    return manifest


def artifact_config(manifest: LatentManifest, **changes: Any) -> ArtifactConfig:
    """Description of a teacher for the set of `manifest`."""
    description: dict[str, Any] = {
        "role": "teacher",
        "architecture": ARCHITECTURE,
        "objective": "flow_matching",
        "conditioning": "expanded",
        "recommended_nfe": (1, 2),
        "normalisation_mean": manifest.mean,
        "normalisation_std": manifest.std,
        "autoencoder_id": manifest.autoencoder_id,
        "autoencoder_sha256": manifest.autoencoder_sha256,
        "latent_manifest_sha256": manifest.sha256,
        "images_seen": 1000,
        "ema_sigma_rel": 0.2,
        "config_hash": "0" * 16,
    }
    return ArtifactConfig(**description | changes)


def write_model(folder: Path, config: ArtifactConfig, *, seed: int = 0) -> str:
    """A random network that does something; returns the hash of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = LightningDiT(config.architecture).state_dict()
        # The initial network gives zero everywhere.
        weights |= {
            name: torch.randn_like(value) * 0.3
            for name, value in weights.items()
            if "adaLN" in name or "final_layer.linear" in name
        }
    return save_artifact(folder, weights, config)
