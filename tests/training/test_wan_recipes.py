"""Wan's recipes: they fit their GPUs, and the predictions at their heads are the planner's."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from facm_core.memory import GIB
from facm_core.models import WanConfig
from facm_core.models.wan import wan_preset
from facm_platform.config import find_recipe, load_config
from facm_platform.training.distill import DistillConfig
from facm_platform.training.memory import worker_memory
from facm_platform.training.run import check_batch, cost_estimate
from facm_platform.training.speed import PEAK, UTILISATION, predicted_seconds, worker_flops

TEACHERS: dict[str, dict[str, Any]] = {
    "wan_1.3b": {"height": 60, "width": 104},
    "wan_5b": {"height": 64, "width": 64},
    "wan_14b": {"height": 128, "width": 128, "boundary": 0.875},
}
GPUS = {"wan_1.3b": 8, "wan_5b": 16, "wan_14b": 32}
USABLE = 0.9 * 80e9 / GIB  # the rest: context and allocator

recipes = pytest.mark.parametrize("recipe", list(GPUS))


def recipe_config(recipe: str) -> DistillConfig:
    return load_config(DistillConfig, recipe, ["data.uri=set", "teacher.uri=wan"])


def teacher_of(recipe: str) -> WanConfig:
    return wan_preset(recipe.replace("_", "-"), **TEACHERS[recipe])


@recipes
def test_workers_share_its_batches_evenly(recipe: str) -> None:
    config = recipe_config(recipe)
    train, workers = config.train, config.workers
    check_batch(train, workers)
    assert (workers.max, workers.min, workers.gpu) == (GPUS[recipe], None, True)
    passes = train.micro_batches(workers.max)
    assert passes * train.micro_batch_size * workers.max == train.global_batch_size
    assert train.images % train.global_batch_size == 0
    text = find_recipe(recipe).read_text()
    assert f"for latents {teacher_of(recipe).latent_shape}" in text
    assert f"# {passes} passes a step" in text


@pytest.mark.slow
@recipes
def test_its_predictions_are_the_planners(recipe: str) -> None:
    config, architecture = recipe_config(recipe), teacher_of(recipe)
    train, workers = config.train, config.workers.max
    memory = worker_memory(architecture, train, workers, teachers=architecture.networks)
    flops = worker_flops(architecture, train, workers, teachers=architecture.networks)
    text = find_recipe(recipe).read_text()
    gib, seconds, tflop, share, peak = re.findall(
        r"([\d.]+) GiB a GPU.*\n.* ([\d.]+) s a step \(([\d,]+) TFLOP .* at (\d+) % .* (\d+) TFL",
        text,
    )[0]
    assert gib == f"{memory.total / GIB:.1f}"
    assert seconds == f"{predicted_seconds(flops):.1f}"
    assert tflop == f"{flops / 1e12:,.0f}"
    assert (int(share), int(peak)) == (round(100 * UTILISATION), PEAK / 1e12)
    assert memory.total / GIB < USABLE


TINY = WanConfig(
    height=4,
    width=4,
    in_channels=4,
    text_tokens=5,
    text_dim=12,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
)


def test_dry_runs_tell_both() -> None:
    config = recipe_config("wan_1.3b")
    train, workers = config.train, config.workers
    flops = worker_flops(TINY, train, workers.max, teachers=1)
    half = replace(train, micro_batch_size=16)
    assert worker_flops(TINY, half, workers.max, teachers=1) == flops
    told = cost_estimate(TINY, train, workers, teachers=1)
    assert told.startswith("MiB for each of 8 workers: parameters ")
    seconds = predicted_seconds(flops)
    assert seconds == pytest.approx(flops / (0.35 * 989e12))
    assert told.endswith(
        f"\nTFLOP a step for each of them: {flops / 1e12:,.4g}, {seconds:,.3g} s at 35% of an "
        "H100's 989 TFLOP/s, which is assumed"
    )
    for slower in (replace(train, precision="float32"), train):
        on_cpus = workers if slower is not train else replace(workers, gpu=False)
        assert " s at " not in cost_estimate(TINY, slower, on_cpus, teachers=1)
