"""How long a step takes, told before the run: from its operations, and an assumed speed."""

from __future__ import annotations

from facm_core.memory import step_flops
from facm_core.models import Architecture
from facm_platform.training.config import LoraConfig, TrainConfig
from facm_platform.training.memory import planned, student_preset

PEAK = 989e12
"""Operations a second of an H100 SXM in bfloat16, without sparsity, by its data sheet."""
UTILISATION = 0.35
"""Share of it that a step is assumed to reach; nobody has measured one of these steps on a GPU."""


def worker_flops(
    architecture: Architecture,
    train: TrainConfig,
    workers: int,
    *,
    teachers: int,
    lora: LoraConfig | None = None,
) -> int:
    """Floating-point operations of a step on each of so many workers, see `step_flops`.

    Every pass is taken for a whole one, and every row for one with guidance.
    `teachers`: frozen networks; 0 when training from scratch. `lora`: the student's adapters.
    """
    preset = student_preset(architecture, lora)
    of_pass = step_flops(preset, planned(train, workers, teachers=teachers))
    return train.micro_batches(workers) * of_pass


def predicted_seconds(flops: int) -> float:
    """Seconds of so many operations on an H100, communication hidden behind them."""
    return flops / (UTILISATION * PEAK)
