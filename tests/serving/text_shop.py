"""A registered model that takes prompts, and what it must draw."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from facm_platform.registry import load_artifact
from facm_platform.registry.generator import Generator
from facm_platform.registry.pyfunc import pyfunc_files
from facm_platform.registry.versions import CHAMPION, register_version
from facm_platform.tracking import Store, TrackingConfig, open_run
from tests.tiny_wan import write_student, write_text_encoder, write_texts

MODEL = "pictures"
PROMPTS = ["a red barn in the snow", "two cats", "ein Leuchtturm \N{CAT} bei Nacht"]


@dataclass(frozen=True)
class TextShop:
    """A registry with one version, the champion."""

    store: Store
    generator: Generator

    def pixels(self, prompt: str, seed: int, steps: int = 2) -> np.ndarray[Any, Any]:
        """uint8 (H, W, C)."""
        (image,) = self.generator.generate([prompt], [seed], steps)
        pixels: np.ndarray[Any, Any] = image.permute(1, 2, 0).numpy()
        return pixels

    def png(self, prompt: str, seed: int, steps: int = 2) -> bytes:
        """The same as a file."""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels(prompt, seed, steps)).save(buffer, "PNG")
        return buffer.getvalue()


def open_text_shop(store: Store, folder: Path, model: str = MODEL) -> TextShop:
    """A random student, registered as jobs/evaluate.py does."""
    write_text_encoder(folder / "pipeline", PROMPTS)
    student = folder / "text-student"
    config = write_student(student, write_texts(folder / "set"), folder / "pipeline", shift=0.5)
    run = open_run(store, "r", job="evaluate", config=TrackingConfig())
    run.log_artifact(student, "model")
    with pyfunc_files(config) as more:
        run.log_artifact(more, "model")
    tags = {"model_sha256": load_artifact(str(student)).sha256, "fid_nfe1": "1.0"}
    version = register_version(run, model, "model", tags, "a test")
    store.client.set_registered_model_alias(model, CHAMPION, version.number)
    return TextShop(store, Generator.load(str(student)))
