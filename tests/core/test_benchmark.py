"""The benchmark: every mode does the same work, and its numbers mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from facm_core import benchmark
from facm_core.benchmark import BASELINE, PHASES, BenchmarkConfig, Report
from facm_core.errors import InvalidInputError
from facm_core.models import LightningDiT

SMALL = {"hidden_size": 64, "depth": 3, "num_heads": 2, "input_size": 8, "in_channels": 4}


@pytest.fixture(scope="module")
def report() -> Report:
    return benchmark.run(
        BenchmarkConfig(
            preset="B/1",
            architecture=SMALL,
            batch_size=4,
            modes=("eager", "recompute"),
            baseline=True,
            steps=2,
        )
    )


def test_every_mode_has_the_loss_of_the_baseline(report: Report) -> None:
    assert list(report.modes) == [BASELINE, "eager", "recompute"]
    expected = report.modes[BASELINE].loss
    assert expected > 0.1
    for got in report.modes.values():
        assert got.loss == pytest.approx(expected, rel=1e-6)


def test_memory(report: Report) -> None:
    baseline, eager, recompute = (got.peak_bytes for got in report.modes.values())
    gradients = 4 * report.parameters
    assert gradients < recompute < 0.5 * eager
    assert eager < 0.7 * baseline


def test_phases_are_parts_of_a_step(report: Report) -> None:
    for got in report.modes.values():
        assert got.phases.keys() == set(PHASES)
        assert min(got.phases.values()) > 0
        assert sum(got.phases.values()) < 1.5 * got.seconds  # medians of few steps


def test_flops_are_nine_forward_passes(report: Report) -> None:
    """Teacher 2, values 2, tangent 1, backward 4; attention's tangent is five products, not two."""
    model = LightningDiT.preset("B/1", **SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    forward = counter.get_total_flops()
    attention = 3 * 2 * 2 * 64 * 64 * 64  # blocks, products, multiply and add, tokens², channels
    # One of four images has no unconditional row: its time is outside the guidance interval.
    expected = (9 - teacher_rows_saved()) * forward + 1.5 * attention
    assert report.flops_per_image == pytest.approx(expected, rel=0.02)


def teacher_rows_saved() -> float:
    bench = benchmark._Bench(BenchmarkConfig(preset="B/1", architecture=SMALL, batch_size=4))
    return 1 - bench.guided.double().mean().item()


def test_table_and_json(report: Report) -> None:
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["mode", *report.modes]
    assert lines[3].split()[-2:] == ["1.00", "1.00"]
    loaded = json.loads(report.to_json())
    assert loaded["modes"]["eager"]["peak_bytes"] == report.modes["eager"].peak_bytes
    metrics = report.metrics()
    assert metrics["baseline_time_ratio"] == 1
    assert metrics["recompute_memory_ratio"] < metrics["eager_memory_ratio"] < 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    fields = [f"{name}={value}" for name, value in SMALL.items()]
    command = ["--preset", "B/1", "--set", *fields, "--batch", "2", "--steps", "1"]
    benchmark.main([*command, "--modes", "eager", "--dtype", "bfloat16", "--json", str(file)])
    assert "eager" in capsys.readouterr().out
    assert json.loads(file.read_text())["config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "XXL"], r"preset = 'XXL': .*Use one of B/1"),
        (["--set", "depht=8"], r"architecture = 'depht': .*depth"),
        (["--set", "depth"], r"--set = 'depth': not FIELD=VALUE"),
        (["--modes", "fast"], r"modes = 'fast': .*Use one of eager"),
        (["--batch", "0"], r"batch_size = 0: below 1"),
        (["--dtype", "int8"], r"dtype = 'int8'"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        benchmark.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="device = 'cuda': PyTorch sees no GPU"):
        benchmark.run(BenchmarkConfig(device="cuda"))
