"""One rank of `test_chain_jvp_fsdp`: each case is one step on this rank's rows of a batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from facm_core.ema import PowerEMA
from facm_core.guidance import GuidanceConfig
from facm_core.jvp import anchored_jvp, chain_jvp
from facm_core.objectives import FACM, FACMConfig
from facm_platform.training.parallel import Sharding
from tests.core.ranks import be_a_rank, build, mean_over_ranks, rows_of_this_rank, whole

Case = dict[str, Any]
Rows = dict[str, Tensor]


def one_step(case: Case) -> dict[str, Any]:
    return {"facm": facm_step, "jvp": jvp_step, "watched": watched_step}[case["step"]](case)


def network(case: Case) -> Any:
    if case["architecture"]:
        return build(case["weights"], **case["architecture"])
    from tests.core.tiny import tiny  # imports slowly, and not every launch needs it

    return tiny(case["network"], seed=1, **case["changes"])


def spread(model: Any, case: Case) -> Any:
    """Over the case's mesh, in units like the platform's; by the platform, which has no float64."""
    if case["mesh"] is None:
        return model
    if case["precision"] != "float64":
        return Sharding(precision=case["precision"]).apply(model.float(), torch.device("cpu"))
    parts = [block.mlp for block in model.blocks] if case["units_in_blocks"] else []
    for unit in (*model.time_embedders, *model.shared_parts, *parts, *model.blocks, model):
        fully_shard(unit, mesh=device_mesh(tuple(case["mesh"])))
    return model


@cache
def device_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def rows_for(case: Case) -> Rows:
    dtype = torch.float64 if case["precision"] == "float64" else torch.float32
    rows = rows_of_this_rank(case["batch"])
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in rows.items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- a step of FACM -----------------------------------------------------------------------------


def facm_step(case: Case) -> dict[str, Any]:
    student = spread(network(case), case)
    teacher = build(case["teacher"], **case["architecture"] | {"second_time": False})
    if teacher is not None:
        teacher = spread(teacher, case)
    ema = PowerEMA(student, [0.2])
    rows = rows_for(case)

    config = FACMConfig(
        conditioning="auxiliary" if student.second_time else "expanded",
        guidance=GuidanceConfig(scale=1.75, low=0.125),
    )
    objective = FACM(config, recompute=case["recompute"])
    output = objective(student, rows.pop("x_1"), rows.pop("condition"), teacher, **rows)
    output.loss.backward()

    parameters = trained(student)
    gradients = {n: whole(p.grad) for n, p in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 0.1 * parameter.grad
    with CommDebugMode() as communication:
        ema.update(student, images_seen=18, images_step=6)
    return {
        "loss": mean_over_ranks(output.loss),
        "gradients": gradients,
        "ema": {n: whole(average) for n, average in ema.profiles["0.2"].items()},
        "ema_collectives": communication.get_total_counts(),
        "is_sharded": all(isinstance(p, DTensor) for p in parameters.values()),
    }


# --- a JVP and its gradients --------------------------------------------------------------------


def jvp_step(case: Case) -> dict[str, Any]:
    """Of the whole batch, or of two halves whose gradients add up."""
    model, rows = network(case), rows_for(case)
    dtypes = time_embedding_dtypes(model)
    if case["compiled"]:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    model = spread(model, case)
    counters.clear()
    parts = halves(rows) if case["accumulate"] else [rows]
    found = []
    with in_float64() if case["precision"] == "float64" else nullcontext():
        for i, part in enumerate(parts):
            if case["accumulate"] == "reduced once":
                model.set_requires_gradient_sync(i == len(parts) - 1)
            found.append(jvp(model, part, case["function"], case["recompute"]))
            (loss_of(found[-1]) / len(parts)).backward()
    return {
        **{name: torch.cat([part[name] for part in found]).detach() for name in found[0]},
        "gradients": {n: whole(p.grad) for n, p in trained(model).items()},
        "is_sharded": all(isinstance(p, DTensor) for p in model.parameters()),
        "time_embedding_dtypes": sorted(dtypes),
        "graphs": counters["stats"]["unique_graphs"],
    }


@contextmanager
def in_float64() -> Iterator[None]:
    """What a network's code casts to float32 becomes float64, to be compared to ten digits."""
    with (
        patch.object(Tensor, "float", Tensor.double),
        patch.object(torch, "float32", torch.float64),
    ):
        yield


def jvp(model: Any, rows: Rows, function: str, recompute: bool) -> dict[str, Tensor]:
    """Value and tangent along (dx, dt); ``anchored``: and the value at FACM's anchor point."""
    primals, tangents, condition, r = arguments(rows)
    if function == "chain":
        value, tangent = chain_jvp(model, primals, tangents, condition, r, recompute=recompute)
        return {"value": value, "tangent": tangent}
    at_anchor, value, tangent = anchored_jvp(
        model,
        anchor_of(*primals, condition, r),
        primals,
        tangents,
        condition,
        r,
        recompute=recompute,
    )
    return {"value": value, "tangent": tangent, "at_anchor": at_anchor}


def arguments(rows: Rows) -> tuple[Any, ...]:
    """(x, t), (dx, dt), the condition, and r where there is one."""
    condition = {n: v for n, v in rows.items() if n not in ("x", "t", "dx", "dt", "r")}
    return (
        (rows["x"], rows["t"]),
        (rows["dx"], rows["dt"]),
        condition.get("label", condition),
        rows.get("r"),
    )


def anchor_of(x: Tensor, t: Tensor, condition: Any, r: Tensor | None) -> tuple[Any, ...]:
    """Where FACM asks for an instantaneous velocity."""
    return x, 2 - t, condition, None if r is None else t


def loss_of(found: dict[str, Tensor]) -> Tensor:
    """A mean over rows, with the tangent as a constant, as in FACM."""
    value = found["value"].flatten(1)
    direction = F.normalize(found["tangent"].detach().flatten(1))
    loss = (value.square() + value * direction).sum(1).mean()
    return loss + found["at_anchor"].square().mean() if "at_anchor" in found else loss


def halves(rows: Rows) -> list[Rows]:
    return [{name: x.chunk(2)[i] for name, x in rows.items()} for i in range(2)]


def time_embedding_dtypes(model: Any) -> set[str]:
    """Fills up with the dtypes of weights and results in the time embedders, as they run."""
    seen: set[str] = set()
    for embedder in model.time_embedders:
        for linear in (m for m in embedder.modules() if isinstance(m, nn.Linear)):
            linear.register_forward_hook(
                lambda linear, _, y: seen.update({str(linear.weight.dtype), str(y.dtype)})
            )
    return seen


# --- what is unsharded, and when ----------------------------------------------------------------


def watched_step(case: Case) -> dict[str, Any]:
    """FACM's two tasks and nothing else: no teacher, no guidance."""
    model = spread(network(case), case)
    calls = Counter[int]()
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: calls.update([i]))
    objective = FACM(
        FACMConfig(guidance=GuidanceConfig(scale=1.0), label_dropout=0.0),
        recompute=case["recompute"],
    )
    (x_1, t), (x_0, _), condition, _ = arguments(rows_for(case))
    watch = Watch(model)
    with watch.on_gathers():
        output = objective(model, x_1, condition, x_0=x_0, t=t / 2)
        forward, watch.gathered = watch.gathered, []
        output.loss.backward()

    names = {module: name for name, module in model.named_modules()}
    blocks = [names[block] for block in model.blocks]
    return {
        "forward": [blocks.index(unit) for unit in forward if unit in blocks],
        "backward": [blocks.index(unit) for unit in watch.gathered if unit in blocks],
        "calls": [calls[i] for i in range(len(blocks))],
        "peak": watch.peak,
        "peak_of_root": watch.peak_of_root,
        "root": watch.size_of(""),
        "block": max(map(watch.size_of, blocks)),
    }


class Watch:
    """Which units are gathered, and the most that is whole at once: parameters and buffers.

    Memory for them is taken in two places of FSDP only. One gathers a unit into a buffer, the other
    copies the buffer out into parameters; after each, everything is counted, in bytes. Gloo's
    threads hold a buffer for a moment after its gather has been waited for: a count above the
    peak so far is therefore taken a second time, once they are done.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {
            name: unit._get_fsdp_state()._fsdp_param_group.fsdp_params
            for name, unit in model.named_modules()
            if isinstance(unit, FSDPModule)
        }
        self.gathered: list[str] = []
        self.buffers: list[tuple[str, ref[Tensor]]] = []
        self.peak = self.peak_of_root = 0

    @contextmanager
    def on_gathers(self) -> Iterator[None]:
        gather, copy_out = fsdp.foreach_all_gather, fsdp.foreach_all_gather_copy_out

        def watched_gather(parameters: Any, *args: Any) -> Any:
            result = gather(parameters, *args)
            unit = next(name for name, own in self.parameters.items() if own is parameters)
            self.gathered.append(unit)
            self.buffers.append((unit, ref(result.all_gather_output)))
            self.count()
            return result

        def watched_copy_out(*args: Any, **kwargs: Any) -> None:
            copy_out(*args, **kwargs)
            self.count()

        with (
            patch.object(fsdp, "foreach_all_gather", watched_gather),
            patch.object(fsdp, "foreach_all_gather_copy_out", watched_copy_out),
        ):
            yield

    def count(self) -> None:
        root, units = self.held()
        if root > self.peak_of_root or units > self.peak:
            time.sleep(0.05)
            root, units = self.held()
        self.peak_of_root = max(self.peak_of_root, root)
        self.peak = max(self.peak, units)

    def held(self) -> tuple[int, int]:
        """Bytes of the root, and of all other units."""
        held = Counter[str]()
        for unit, parameters in self.parameters.items():
            for parameter in parameters:
                held[unit] += sum(
                    x.untyped_storage().nbytes() for x in parameter.all_gather_outputs
                )
        for unit, buffer in self.buffers:
            held[unit] += 0 if (x := buffer()) is None else x.untyped_storage().nbytes()
        return held.pop(""), held.total()

    def size_of(self, part: str) -> int:
        """Bytes of its whole parameters; "" is what belongs to no other unit."""
        return sum(
            x.nbytes
            for unit, parameters in self.parameters.items()
            if unit == part or (part and unit.startswith(f"{part}."))
            for parameter in parameters
            for x in parameter.all_gather_outputs
        )


if __name__ == "__main__":
    be_a_rank(one_step)
