"""The memory planner against what a step really takes, and against arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from facm_core import memory
from facm_core.benchmark import BenchmarkConfig, _Bench
from facm_core.flops import FlopCounter
from facm_core.guidance import GuidanceConfig
from facm_core.memory import MemoryConfig, plan, preset_of, step_flops
from facm_core.models import LightningDiT, WanConfig, build_network
from facm_core.models.lightning_dit import preset_config
from facm_core.models.wan import wan_preset
from facm_core.objectives import FACM, FACMConfig

SMALL = {"hidden_size": 96, "depth": 4, "num_heads": 3, "input_size": 16, "in_channels": 8}


def plan_small(config: MemoryConfig, **settings: Any) -> memory.MemoryPlan:
    return plan(preset_of(preset_config("B/1", **SMALL | settings)), config)


@pytest.mark.parametrize(
    ("mode", "dtype", "settings", "batch_size"),
    [
        ("eager", "float32", {}, 8),
        ("recompute", "float32", {"depth": 6}, 8),
        ("eager", "bfloat16", {"hidden_size": 64, "num_heads": 1}, 4),
        ("recompute", "float32", {"input_size": 8, "hidden_size": 192, "depth": 3}, 16),
    ],
)
def test_within_a_tenth_of_what_is_measured(
    mode: str, dtype: str, settings: dict[str, Any], batch_size: int
) -> None:
    bench = _Bench(
        BenchmarkConfig(
            preset="B/1", architecture=SMALL | settings, batch_size=batch_size, dtype=dtype
        )
    )
    bench.step(mode)
    config = MemoryConfig(batch_size=batch_size, dtype=dtype, recompute=mode == "recompute")
    assert plan_small(config, **settings).step == pytest.approx(bench.peak_bytes(mode), rel=0.1)


def test_what_lives_through_the_run() -> None:
    model = LightningDiT.preset("B/1", **SMALL)
    size = sum(p.numel() for p in model.parameters())
    frozen = model.pos_embed.numel()
    got = plan_small(MemoryConfig(gpus=2, teachers=2, averages=3))
    assert got.parameters == 4 * size // 2
    assert got.optimizer == pytest.approx(2 * 4 * (size - frozen) / 2, abs=4)
    assert got.averages == pytest.approx(3 * 4 * (size - frozen) / 2, abs=4)
    assert got.teachers == 2 * got.parameters
    assert got.gradients == pytest.approx(4 * (size - frozen) / 2, abs=4)
    assert got.total == sum(size for name, size in got.rows() if name != "total")


def test_unsharded_memory_follows_the_largest_block() -> None:
    config = MemoryConfig(gpus=4)
    shallow, deep = (plan_small(config, depth=depth) for depth in (2, 6))
    assert shallow.unsharded == deep.unsharded
    model = LightningDiT.preset("B/1", **SMALL | {"depth": 1})
    block = sum(p.numel() for p in model.blocks[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - block
    assert shallow.unsharded == 4 * (5 * block + rest)
    assert plan_small(replace(config, gpus=1)).unsharded == 0


def test_recomputation_keeps_one_more_input_for_one_more_block() -> None:
    few, many = (plan_small(MemoryConfig(recompute=True, batch_size=8), depth=d) for d in (4, 8))
    inputs = 2 * 8 * (16 * 16 * 96 + 96) * 4  # both tasks: tokens, and conditioning
    assert many.step - few.step == pytest.approx(4 * inputs, rel=0.1)


def test_activations_are_linear_in_tokens() -> None:
    few, many = (plan_small(MemoryConfig(batch_size=4), input_size=size) for size in (16, 32))
    assert many.step < 4.4 * few.step


def test_teacher_training_needs_less() -> None:
    distill, pretrain = (plan_small(MemoryConfig(batch_size=8, jvp=jvp)) for jvp in (True, False))
    assert pretrain.activations < 0.6 * distill.activations


@pytest.mark.parametrize(
    ("name", "billions"), [("wan-1.3b", 1.42), ("wan-5b", 5.0), ("wan-14b", 14.29)]
)
def test_wan(name: str, billions: float) -> None:
    """Parameters as published; nothing of them is ever allocated."""
    config = MemoryConfig(gpus=32, dtype="bfloat16", recompute=True, teachers=2)
    got = plan(preset_of(wan_preset(name, height=16, width=16)), config)
    assert got.parameters * 32 / 4 == pytest.approx(billions * 1e9, rel=0.01)
    assert got.unsharded > 0
    assert got.activations > 0


# --- operations ---------------------------------------------------------------------------------

WAN = WanConfig(
    height=16,
    width=24,
    in_channels=4,
    text_tokens=24,
    text_dim=40,
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=32,
    ffn_dim=256,
)


def forward_flops(wan: WanConfig) -> int:
    """Of one row, by hand: two for each weight of a matrix and token, and attention's products."""
    d, text = wan.num_attention_heads * wan.attention_head_dim, wan.text_tokens
    tokens = wan.height * wan.width // 4
    matrices = tokens * (4 * d * d + 2 * d * d + 2 * d * wan.ffn_dim) + text * 2 * d * d
    attention = 2 * tokens * tokens * d + 2 * tokens * text * d
    patches = 2 * tokens * d * 4 * wan.in_channels
    prompt = text * (wan.text_dim * d + d * d)
    time = wan.freq_dim * d + d * d + 6 * d * d
    return 2 * (wan.num_layers * (matrices + attention) + patches + prompt + time)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("teachers", [1, 2])
def test_operations_of_guidance(batch_size: int, teachers: int) -> None:
    """Two rows for each image, and one more in every call for an expert without rows."""
    config = MemoryConfig(batch_size=batch_size, teachers=teachers)
    with_teacher = step_flops(preset_of(WAN), config)
    without = step_flops(preset_of(WAN), replace(config, teachers=0))
    rows = 2 * batch_size + teachers - 1
    assert with_teacher - without == rows * forward_flops(WAN)


@pytest.mark.parametrize(("recompute", "passes"), [(False, 7), (True, 9)])
@pytest.mark.parametrize("boundary", [None, 0.5])
def test_operations_of_training(recompute: bool, passes: int, boundary: float | None) -> None:
    """Values 2, a tangent 1, backwards 4; blocks once more where they are recomputed."""
    config = MemoryConfig(batch_size=2, teachers=0, recompute=recompute)
    got = step_flops(preset_of(replace(WAN, boundary=boundary)), config)
    rows = 2 if boundary is None else 2.5
    assert got == pytest.approx(passes * rows * forward_flops(WAN), rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_of_a_real_step(recompute: bool) -> None:
    """Of the objective as training calls it."""
    torch.manual_seed(0)
    student, teacher = (build_network(WAN) for _ in range(2))
    text = {"text_embedding": torch.randn(2, 24, 40), "text_mask": torch.ones(2, 24)}
    x = torch.randn(2, *WAN.latent_shape)
    guidance = GuidanceConfig(scale=4.0)
    facm = FACM(FACMConfig(label_dropout=0.0, guidance=guidance), recompute=recompute)
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        facm(student, x, text, teacher.requires_grad_(False)).loss.backward()
    predicted = step_flops(preset_of(WAN), MemoryConfig(batch_size=2, recompute=recompute))
    assert predicted == counter.total


def test_operations_of_the_training_of_a_teacher() -> None:
    """Against PyTorch's own counter, which cannot look into a pass with tangents."""
    model, x = build_network(WAN), torch.randn(2, *WAN.latent_shape)
    text = {"text_embedding": torch.randn(2, 24, 40), "text_mask": torch.ones(2, 24)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.tensor([0.1, 1.6]), text).square().mean().backward()
    got = step_flops(preset_of(WAN), MemoryConfig(batch_size=2, teachers=0, jvp=False))
    assert got == counter.get_total_flops()


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "XXL"], r"--preset = 'XXL': .*wan-14b"),
        (["--preset", "wan-14b", "--set", "depth=3"], r"--set = \['depth=3'\]: Wan's sizes"),
        (
            ["--preset", "wan-5b", "--latent", "45", "80"],
            r"patch_size = \(1, 2, 2\): does not divide",
        ),
        (["--gpus", "0"], r"gpus = 0: below 1"),
        (["--teachers", "-1"], r"teachers = -1: negative"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        memory.main(arguments)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--preset", "B/2", "--set", "depth=2", "--gpus", "2", "--capacity", "8"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["recorded", "recomputed"]
    rows = {line.rsplit(maxsplit=2)[0]: line.split()[-2:] for line in lines}
    (recorded, recomputed), (share, _) = rows["total"], rows["of capacity"]
    assert float(recomputed) < float(recorded)
    assert share == f"{float(recorded) / 8:.0%}"
