"""How much memory a FACM run needs, before it has any; and how many operations its steps take.

    python -m facm_core.memory --preset wan-14b --gpus 32 --batch 1 --dtype bfloat16 --teachers 2

What lives through a run is counted; what a step needs beside that is found by running the step on
tensors without storage, with every allocation and release noted: once with recorded blocks, once
with recomputed ones.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from facm_core.benchmark import parse_fields
from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.flops import FlopCounter
from facm_core.models import Architecture, build_network
from facm_core.models.base import Condition
from facm_core.models.lightning_dit import PRESETS, preset_config
from facm_core.models.wan import WAN_PRESETS, WanConfig, wan_preset
from facm_core.objectives import FACM, FACMConfig
from facm_core.objectives.base import mean_square
from facm_core.precision import DTYPES, cast_parameters

GIB = 2**30
FLOAT32 = 4  # bytes: of weights, gradients, averages and the optimizer's moments

Example = Callable[[int], tuple[Tensor, Condition]]
"""``example(rows)``: data x and its condition, of any values."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """A run, as far as memory goes.

    Attributes:
        gpus: Over which everything is sharded.
        batch_size: Images a step on each GPU.
        dtype: Of computation: ``float32`` or ``bfloat16``.
        recompute: Blocks keep their inputs only.
        teachers: Frozen networks of the size of the student's, e.g. 2 for the experts of Wan 2.2.
        teacher_gpus: Over which these are sharded; None: as everything.
        averages: EMA profiles.
        jvp: Whether a step is FACM's; else flow matching's, as in the training of a teacher.
    """

    gpus: int = 1
    batch_size: int = 1
    dtype: str = "float32"
    recompute: bool = False
    teachers: int = 1
    teacher_gpus: int | None = None
    averages: int = 2
    jvp: bool = True

    def __post_init__(self) -> None:
        for name in ("gpus", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        for name in ("teachers", "averages"):
            value = getattr(self, name)
            require(value >= 0, name, value, "negative", "Use 0 for none")
        require_one_of("dtype", self.dtype, tuple(DTYPES))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each GPU.

    Attributes:
        parameters: The student's shard, in float32 like all that lives through the run.
        optimizer: AdamW's two moments.
        averages: EMA profiles.
        teachers: Shards of the frozen networks.
        gradients: The shard of the student's gradient.
        unsharded: Two blocks in one piece (the one at work and the next), one block's gathered
            buffer, gradient and reduction buffer, and what is no block's. None of it on one GPU.
        activations: What the step needs at its peak beyond all that. Not every gradient exists
            by then, so it looks smaller where gradients are large.
    """

    parameters: int
    optimizer: int
    averages: int
    teachers: int
    gradients: int
    unsharded: int
    activations: int

    @property
    def step(self) -> int:
        """Peak of a step above what lives through the run."""
        return self.gradients + self.unsharded + self.activations

    @property
    def total(self) -> int:
        """Peak. A GPU's context and allocator take some 5 to 10 % more."""
        return sum(getattr(self, item.name) for item in fields(self))

    def rows(self) -> list[tuple[str, int]]:
        """Item and bytes, the total last."""
        return [
            *((item.name, getattr(self, item.name)) for item in fields(self)),
            ("total", self.total),
        ]


@dataclass(frozen=True)
class Preset:
    """A network and data for it.

    Attributes:
        build: Makes the network.
        example: Makes data.
        networks: The student is so many of them, which share the rows.
        adapt: Makes of one such network what the student has and its teachers have not.
    """

    build: Callable[[], Any]
    example: Example
    networks: int = 1
    adapt: Callable[[Any], object] = lambda _: None


def preset_of(architecture: Architecture) -> Preset:
    """An architecture, and data of its shapes."""

    def example(rows: int) -> tuple[Tensor, Condition]:
        x, text = torch.ones(rows, *architecture.latent_shape), architecture.text_shape
        if not text:
            return x, torch.zeros(rows, dtype=torch.int64)
        return x, {
            "text_embedding": torch.ones(rows, *text),
            "text_mask": torch.ones(rows, text[0]),
        }

    one = architecture
    if isinstance(one, WanConfig):
        one = replace(one, boundary=None)
    return Preset(lambda: build_network(one), example, architecture.networks)


def plan(preset: Preset, config: MemoryConfig) -> MemoryPlan:
    """Memory of a FACM run.

    Args:
        preset: The student, and teachers like it.
        config: The run.
    """
    with FakeTensorMode():
        model = preset.build()
        teacher = sum(p.numel() for p in model.parameters())
        preset.adapt(model)
        model = cast_parameters(model, DTYPES[config.dtype])
        peak = _step_peak(model, preset.example, config)
    unsharded = 0
    if config.gpus > 1:
        unsharded = _unsharded(model, DTYPES[config.dtype].itemsize, preset.networks)
    shard, trained_shard = (
        FLOAT32
        * sum(p.numel() for p in model.parameters() if p.requires_grad or everything)
        // config.gpus
        for everything in (True, False)
    )
    return MemoryPlan(
        parameters=preset.networks * shard,
        optimizer=2 * preset.networks * trained_shard,
        averages=config.averages * preset.networks * trained_shard,
        teachers=config.teachers * (FLOAT32 * teacher // (config.teacher_gpus or config.gpus)),
        gradients=preset.networks * trained_shard,
        unsharded=unsharded,
        activations=max(0, peak - trained_shard),
    )


def _unsharded(model: Any, itemsize: int, networks: int) -> int:
    """Bytes of parameters and gradients in one piece; see `MemoryPlan`."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    trained = [sum(p.numel() for p in b.parameters() if p.requires_grad) for b in model.blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    largest = max(blocks) * 3 * itemsize + max(trained) * (itemsize + FLOAT32)
    return largest + networks * rest * itemsize


def step_flops(preset: Preset, config: MemoryConfig) -> int:
    """Floating-point operations of `batch_size` images on a GPU, as `FlopCounter` counts them.

    Of the teacher with guidance in every row, of the student forwards and backwards, and of
    recomputed blocks where `recompute` is on; what fused attention computes anew in its backward
    pass is not counted. Of networks that share the rows, each call runs all: one row more for each
    that has none, as if all rows of a call were of one network.

    Args:
        preset: The student, and teachers of that size.
        config: The run.
    """
    rows = 2 * config.batch_size  # of every call
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # not every fused kernel has a formula
        dtype = DTYPES[config.dtype]
        teacher, student = FlopCounter(), FlopCounter()  # type: ignore[no-untyped-call]
        model = cast_parameters(preset.build(), dtype)
        with teacher:
            _Step(model, preset.example, config).guide()
        preset.adapt(model)
        model = cast_parameters(model, dtype)
        with student:
            _Step(model, preset.example, config).train()
    idle_teachers, idle_students = max(0, config.teachers - 1), preset.networks - 1
    total = teacher.total * (rows + idle_teachers) + student.total * (rows + idle_students)
    return total // rows


def _step_peak(model: Any, example: Example, config: MemoryConfig) -> int:
    """Peak of a step's activations and sharded gradients."""
    step = _Step(model, example, config)
    given = tree_leaves((step.x, step.condition))
    ledger = _Ledger([*model.parameters(), *model.buffers(), *given])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.reduce(p, config.gpus))
    with ledger:
        step.guide()
        step.train()
    return ledger.peak


class _Step:
    """What is done to a batch, with any data."""

    def __init__(self, model: Any, example: Example, config: MemoryConfig) -> None:
        self.model, self.config = model, config
        self.x, self.condition = example(config.batch_size)
        self.t = torch.full((config.batch_size,), 0.5)
        self.both, self.time = example(2 * config.batch_size), self.t.repeat(2)

    @torch.no_grad()
    def guide(self) -> None:
        """The teacher, on conditional and unconditional rows."""
        if self.config.teachers:
            x, condition = self.both
            self.model(x, self.time, condition, self.time if self.model.second_time else None)

    def train(self) -> None:
        """The student, forwards and backwards."""
        model, x, t, condition = self.model, self.x, self.t, self.condition
        objective = FACM(
            FACMConfig(conditioning="auxiliary" if model.second_time else "expanded"),
            recompute=self.config.recompute,
        )
        if self.config.jvp:
            loss = objective.loss(model, x, t, torch.ones_like(x), condition).loss
        else:
            loss = mean_square(model(x, t, condition, t if model.second_time else None), x)
        loss.backward()


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.reduced: set[Tensor] = set()
        self.storages: weakref.WeakSet[Any] = weakref.WeakSet(x.untyped_storage() for x in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.storages:
            self.storages.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def reduce(self, parameter: Tensor, gpus: int) -> None:
        """A gradient becomes, or joins, its shard."""
        parameter.grad = None
        if parameter not in self.reduced:
            self.reduced.add(parameter)
            self._add(FLOAT32 * parameter.numel() // gpus)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m facm_core.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = MemoryConfig()
    presets = ", ".join([*PRESETS, *WAN_PRESETS])
    parser.add_argument("--preset", default="XL/1", help=f"one of {presets}")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of the LightningDiT that differ from the preset, e.g. depth=8",
    )
    parser.add_argument(
        "--latent",
        nargs=2,
        type=int,
        default=(90, 160),
        metavar=("HEIGHT", "WIDTH"),
        help="latent of Wan; 90 160 is an image of 720p (44 80 for wan-5b)",
    )
    parser.add_argument("--gpus", type=int, default=default.gpus, help="in all")
    parser.add_argument("--batch", type=int, default=default.batch_size, help="images a GPU")
    parser.add_argument("--dtype", default=default.dtype, help=" or ".join(DTYPES))
    parser.add_argument("--teachers", type=int, default=default.teachers, help="frozen networks")
    parser.add_argument("--averages", type=int, default=default.averages, help="EMA profiles")
    parser.add_argument("--capacity", type=int, default=80, help="memory of a GPU in GiB")
    given = parser.parse_args(arguments)
    try:
        config = MemoryConfig(
            gpus=given.gpus,
            batch_size=given.batch,
            dtype=given.dtype,
            teachers=given.teachers,
            averages=given.averages,
        )
        if given.preset in WAN_PRESETS:
            require(not given.set, "--set", given.set, "Wan's sizes are fixed", "Leave it out")
            height, width = given.latent
            architecture: Architecture = wan_preset(given.preset, height=height, width=width)
        else:
            require_one_of("--preset", given.preset, (*PRESETS, *WAN_PRESETS))
            architecture = preset_config(given.preset, **parse_fields(given.set))
        preset = preset_of(architecture)
        plans = [plan(preset, replace(config, recompute=recompute)) for recompute in (False, True)]
    except InvalidInputError as error:
        sys.exit(f"error: {error}")
    print(f"{'GiB a GPU':<12}{'recorded':>12}{'recomputed':>12}")
    for (name, recorded), (_, recomputed) in zip(*(p.rows() for p in plans), strict=True):
        print(f"{name:<12}{recorded / GIB:>12.2f}{recomputed / GIB:>12.2f}")
    shares = (f"{p.total / given.capacity / GIB:>12.0%}" for p in plans)
    print(f"{'of capacity':<12}{''.join(shares)}")


if __name__ == "__main__":
    main()
