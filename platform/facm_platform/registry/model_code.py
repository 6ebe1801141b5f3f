"""The code of a registered version, which MLflow runs from the model's own folder.

Nothing imports this file: `facm_platform.registry.pyfunc` copies it there.
"""

from __future__ import annotations

from typing import Any

import mlflow.models
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from facm_platform.registry.generator import Generator


class RegisteredGenerator(PythonModel):
    """Classes or prompts in, images out; row k of the input is drawn with the seed ``seed + k``."""

    # MLflow passes it by this name.
    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that lie beside this file."""
        self._generator = Generator.load(context.artifacts["model"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Images uint8 (B, H, W, C)."""
        given = params or {}
        subjects: list[int] | list[str]
        if self._generator.takes_prompts:
            subjects = [str(prompt) for prompt in model_input["prompt"]]
        else:
            subjects = [int(label) for label in model_input["label"]]
        first = int(given.get("seed", 0))
        steps = int(given.get("steps", self._generator.default_steps))
        seeds = range(first, first + len(subjects))
        images = self._generator.generate(subjects, seeds, steps)
        return images.permute(0, 2, 3, 1).numpy()


mlflow.models.set_model(RegisteredGenerator())
