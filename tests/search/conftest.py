"""A small search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from facm_platform.config.sections import RunConfig
from facm_platform.search import SearchConfig
from facm_platform.search.config import BudgetConfig, ConfirmConfig, StoppingConfig
from facm_platform.training.config import ValidationConfig

SPACE: dict[str, Any] = {
    "objective": {
        "lambda_fm": {"log_uniform": [1e-3, 10]},
        "times": {
            "one_of": [{"kind": "logit_normal", "mean": {"uniform": [-1, 1]}}, {"kind": "uniform"}]
        },
    }
}


def make_config(folder: Path, **changes: Any) -> SearchConfig:
    """Of trials of 80 images, the first rung at 10."""
    given: dict[str, Any] = {
        "run": RunConfig(name="s", storage_uri=str(folder / "runs")),
        "recipe": str(folder / "recipe.yaml"),
        "space": SPACE,
        "validation": ValidationConfig(features_uri="features", samples=100),
        "budget": BudgetConfig(images=80, trials=6),
        "stopping": StoppingConfig(first_images=10),
        "confirm": ConfirmConfig(samples=100),
    }
    return SearchConfig(**{**given, **changes})
