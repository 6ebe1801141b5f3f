"""What a FACM step costs, against the plain whole-model formulation on the same inputs.

    python -m facm_core.benchmark --preset XL/1 --batch 64 --dtype bfloat16 --baseline

The baseline is FACM as one writes it first: teacher calls one after the other, a separate forward
pass for the anchor, `torch.func.jvp` over the whole network with the tangents' graph recorded, and
unfused attention, which is the only one that has a forward-mode derivative.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.flops import FlopCounter
from facm_core.guidance import guide, guided_velocity
from facm_core.interpolant import interpolate, per_sample
from facm_core.models import LightningDiT
from facm_core.objectives import FACM, FACMConfig
from facm_core.precision import DTYPES, cast_parameters

MODES = ("eager", "recompute", "compiled", "compiled-recompute")
BASELINE, MATRICES = "baseline", "matrices"
PHASES = ("teacher", "forward", "jvp", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is measured.

    Attributes:
        preset: Size of the LightningDiT, see `LightningDiT.preset`.
        architecture: Fields of `LightningDiTConfig` that differ from the preset.
        batch_size: Images a step.
        dtype: Of weights and activations: ``float32`` or ``bfloat16``.
        device: ``cpu`` or ``cuda``.
        modes: Some of `MODES`.
        baseline: Measure the plain formulation beside them.
        steps: Timed steps of each mode, after one that is not timed.
        threads: CPU threads; 0 for PyTorch's choice.
    """

    preset: str = "B/2"
    architecture: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    modes: tuple[str, ...] = MODES
    baseline: bool = False
    steps: int = 5
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.threads >= 0, "threads", self.threads, "negative", "Use 0 for the default")
        require_one_of("dtype", self.dtype, tuple(DTYPES))
        require_one_of("device", self.device, ("cpu", "cuda"))
        for mode in self.modes:
            require_one_of("modes", mode, MODES)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Of one mode.

    Attributes:
        images_per_second: At the median step.
        seconds: Median seconds of a step.
        phases: Median seconds of its parts. ``forward`` is an ordinary forward pass of the rows of
            both tasks, ``jvp`` what the pass with tangents takes longer than that (for the
            baseline: the anchor's pass, and `torch.func.jvp`). The rest of a step is losses.
        peak_bytes: Peak memory of a step above parameters and optimizer state.
        loss: Of the first step.
    """

    images_per_second: float
    seconds: float
    phases: dict[str, float]
    peak_bytes: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of all modes.

    Attributes:
        config: What was measured.
        device: Name of the device.
        torch: Version of PyTorch.
        parameters: Of the student.
        flops_per_image: Multiplications and additions of matrix products, convolutions and
            attention in one step, without recomputation.
        matrix_peak: Measured FLOP/s of a large matrix product in `dtype`.
        modes: Mode -> measurement.
    """

    config: BenchmarkConfig
    device: str
    torch: str
    parameters: int
    flops_per_image: float
    matrix_peak: float
    modes: dict[str, Measurement]

    def table(self) -> str:
        """As text, one line a mode; ratios are to the baseline."""
        base = self.modes.get(BASELINE)
        names = ("mode", "images/s", "s/step", *PHASES, "peak MiB", "matrix peak", "time", "memory")
        rows: list[tuple[str, ...]] = [names]
        for mode, got in self.modes.items():
            used = self.flops_per_image * got.images_per_second / self.matrix_peak
            ratios = (got.seconds / base.seconds, got.peak_bytes / base.peak_bytes) if base else ()
            numbers = (got.images_per_second, got.seconds, *(got.phases[name] for name in PHASES))
            row = [mode, *(f"{number:.3f}" for number in numbers)]
            row += [f"{got.peak_bytes / 2**20:.0f}", f"{used:.0%}"]
            rows.append((*row, *(f"{ratio:.2f}" for ratio in ratios), *[""] * (2 - len(ratios))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        head = (
            f"{self.config.preset} {self.config.architecture or ''} {self.parameters / 1e6:.1f} M "
            f"parameters, batch {self.config.batch_size}, {self.config.dtype}, {self.device}, "
            f"torch {self.torch}\n{self.flops_per_image / 1e9:.2f} GFLOP/image, "
            f"matrix peak {self.matrix_peak / 1e12:.3f} TFLOP/s"
        )
        return "\n".join([head, *lines])

    def metrics(self) -> dict[str, float]:
        """Images per second and peak MiB of each mode, and its ratios to the baseline."""
        base = self.modes.get(BASELINE)
        metrics = {}
        for mode, got in self.modes.items():
            metrics[f"{mode}_images_per_second"] = got.images_per_second
            metrics[f"{mode}_peak_mib"] = got.peak_bytes / 2**20
            if base is not None:
                metrics[f"{mode}_time_ratio"] = got.seconds / base.seconds
                metrics[f"{mode}_memory_ratio"] = got.peak_bytes / base.peak_bytes
        return metrics

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=2)


def run(config: BenchmarkConfig) -> Report:
    """Measure every mode; steps of the modes alternate, so that all see the same machine.

    Raises:
        InvalidInputError: an unknown preset or field, or no GPU where one is asked for.
    """
    require(
        config.device == "cpu" or torch.cuda.is_available(),
        "device",
        config.device,
        "PyTorch sees no GPU here",
        "Use cpu, or a machine with a GPU",
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    bench = _Bench(config)
    modes = [BASELINE, *config.modes] if config.baseline else list(config.modes)
    losses = {mode: bench.step(mode) for mode in modes}  # compiles, too
    peaks = {mode: bench.peak_bytes(mode) for mode in modes}
    bench.clock.spans.clear()
    for _ in range(config.steps):
        for mode in modes:
            bench.step(mode)
            bench.time_forward(mode)
        bench.time_matrices()
    return Report(
        config=config,
        device=torch.cuda.get_device_name() if config.device == "cuda" else "CPU",
        torch=torch.__version__,
        parameters=sum(p.numel() for p in bench.student.parameters()),
        flops_per_image=bench.flops() / config.batch_size,
        matrix_peak=bench.matrix_peak(),
        modes={
            mode: Measurement(
                images_per_second=config.batch_size / bench.clock.median(mode, "step"),
                seconds=bench.clock.median(mode, "step"),
                phases=bench.phases(mode),
                peak_bytes=peaks[mode],
                loss=losses[mode],
            )
            for mode in modes
        },
    )


class _Clock:
    """Seconds by mode and name; waits for the GPU at both ends of a span."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spans: dict[tuple[str, str], list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, mode: str, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.spans[mode, name].append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def median(self, mode: str, name: str) -> float:
        return statistics.median(self.spans[mode, name])


class _Bench:
    """Networks and inputs of a benchmark; the learning rate is 0, so every step is the same."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.clock = _Clock(config.device)
        self.generator = torch.Generator().manual_seed(0)
        self.student, self.teacher = self._network(), self._network().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=0.0, weight_decay=0.0)
        self.compiled: dict[nn.Module, Any] = {}
        self.side = 8192 if config.device == "cuda" else 2048
        self.objective = FACM(FACMConfig())
        self.guidance = self.objective.config.guidance
        c = self.student.config
        shape = (config.batch_size, c.in_channels, c.input_size, c.input_size)
        draws = self.objective.draw(shape, self.generator)
        x_1 = torch.randn(shape, generator=self.generator)
        self.t = draws.t.to(config.device)
        self.x_t = interpolate(draws.x_0, x_1, draws.t).to(config.device)
        labels = torch.randint(c.num_classes, shape[:1], generator=self.generator)
        self.labels = torch.where(draws.dropped, c.num_classes, labels).to(config.device)
        self.guided = self.guidance.rows(self.t) & ~draws.dropped.to(config.device)

    def step(self, mode: str) -> float:
        """One optimizer step; its loss."""
        with self._compiled("compiled" in mode), self.clock(mode, "step"):
            loss = self._baseline_loss() if mode == BASELINE else self._loss(mode)
            with self.clock(mode, "backward"):
                loss.backward()
            with self.clock(mode, "optimizer"):
                self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def time_forward(self, mode: str) -> None:
        """An ordinary recorded forward pass of the rows of both tasks, if not part of a step."""
        if mode == BASELINE:
            return
        time = torch.cat([2 - self.t, self.t])
        with self._compiled("compiled" in mode), self.clock(mode, "forward"):
            self.student(self.x_t.repeat(2, 1, 1, 1), time, self.labels.repeat(2))

    def phases(self, mode: str) -> dict[str, float]:
        """Median seconds of each of `PHASES`."""
        spans = {name: self.clock.median(mode, name) for name in PHASES if name != "jvp"}
        if mode == BASELINE:
            jvp = self.clock.median(mode, "jvp")
        else:
            jvp = self.clock.median(mode, "student") - spans["forward"]
        return {name: spans.get(name, jvp) for name in PHASES}

    def peak_bytes(self, mode: str) -> int:
        """Peak memory of a step above what lives before it."""
        gc.collect()
        if self.config.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step(mode)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step(mode)
        events = profiler.profiler.kineto_results.events()
        changes = (event.nbytes() for event in events if event.name() == "[memory]")
        return max(accumulate(changes))

    def flops(self) -> int:
        """Of one step without recomputation."""
        counter = FlopCounter()  # type: ignore[no-untyped-call]
        with sdpa_kernel(SDPBackend.MATH), counter:  # not every fused kernel has a formula
            self.step("eager")
        return counter.total

    def time_matrices(self) -> None:
        """A product of large square matrices, three times."""
        a = torch.randn(self.side, self.side, device=self.config.device)
        a = a.to(DTYPES[self.config.dtype])
        for _ in range(3):
            with self.clock(MATRICES, "product"):
                a @ a

    def matrix_peak(self) -> float:
        """FLOP/s of the fastest such product."""
        return 2 * self.side**3 / min(self.clock.spans[MATRICES, "product"])

    def _network(self) -> LightningDiT:
        model = LightningDiT.preset(self.config.preset, **self.config.architecture)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02, generator=self.generator)
        return cast_parameters(model, DTYPES[self.config.dtype]).to(self.config.device)

    @contextmanager
    def _compiled(self, wanted: bool) -> Iterator[None]:
        """Compiled blocks, for a while; compiled once."""
        if wanted and not self.compiled:
            for block in (*self.student.blocks, *self.teacher.blocks):
                block.compile()
                self.compiled[block] = block._compiled_call_impl
        for block, implementation in self.compiled.items():
            block._compiled_call_impl = implementation if wanted else None
        yield

    def _loss(self, mode: str) -> Tensor:
        with torch.no_grad(), self.clock(mode, "teacher"):
            v = guided_velocity(
                self.teacher, self.x_t, self.t, self.labels, self.guidance.scale, self.guided
            ).to(self.x_t)
        self.objective.recompute = "recompute" in mode
        with self.clock(mode, "student"):
            return self.objective.loss(self.student, self.x_t, self.t, v, self.labels).loss

    def _baseline_loss(self) -> Tensor:
        x_t, t, labels, clock = self.x_t, self.t, self.labels, self.clock
        with sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad(), clock(BASELINE, "teacher"):
                v_c = self.teacher(x_t, t, labels)
                v_u = self.teacher(x_t, t, self.teacher.null_condition(labels))
                guided = per_sample(self.guided, v_c)
                v = torch.where(guided, guide(v_c, v_u, self.guidance.scale), v_c).to(x_t)
            with clock(BASELINE, "forward"):
                f_fm = self.student(x_t, 2 - t, labels)
            with clock(BASELINE, "jvp"):
                f_cm, df_dt, *_ = torch.func.jvp(
                    lambda x, t: self.student(x, t, labels), (x_t, t), (v, torch.ones_like(t))
                )
        f_fm, f_cm, df_dt = f_fm.to(v.dtype), f_cm.to(v.dtype), df_dt.detach().to(v.dtype)
        return self.objective.combine(f_fm, f_cm, df_dt, v, t).loss


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m facm_core.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = BenchmarkConfig()
    parser.add_argument("--preset", default=default.preset, help="size of the LightningDiT")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the architecture that differ from the preset, e.g. depth=8",
    )
    parser.add_argument("--batch", type=int, default=default.batch_size, help="images a step")
    parser.add_argument("--dtype", default=default.dtype, help=" or ".join(DTYPES))
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--modes", nargs="+", default=MODES, help=f"some of {', '.join(MODES)}")
    parser.add_argument("--baseline", action="store_true", help="measure the plain formulation too")
    parser.add_argument("--steps", type=int, default=default.steps, help="timed steps")
    parser.add_argument("--threads", type=int, default=default.threads, help="CPU threads")
    parser.add_argument("--json", type=Path, help="file for the report")
    given = parser.parse_args(arguments)
    try:
        report = run(
            BenchmarkConfig(
                preset=given.preset,
                architecture=parse_fields(given.set),
                batch_size=given.batch,
                dtype=given.dtype,
                device=given.device,
                modes=tuple(given.modes),
                baseline=given.baseline,
                steps=given.steps,
                threads=given.threads,
            )
        )
    except InvalidInputError as error:
        sys.exit(f"error: {error}")
    print(report.table())
    if given.json is not None:
        given.json.write_text(report.to_json())


def parse_fields(assignments: list[str]) -> dict[str, Any]:
    """``["depth=8", "second_time=true"]`` as fields and their JSON values.

    Raises:
        InvalidInputError: not of that form.
    """
    fields = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            raise InvalidInputError(
                "--set", assignment, "not FIELD=VALUE", "Write e.g. --set depth=8"
            ) from None
    return fields


if __name__ == "__main__":
    main()
