"""Chain-JVP and FACM under FSDP2, on several ranks, against one process on the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.core.chain_ranks import anchor_of, arguments, in_float64, loss_of
from tests.core.ranks import Results, run_ranks
from tests.core.tiny import NETWORKS as DIFFUSERS
from tests.core.tiny import tiny, tiny_batch

Case = dict[str, Any]
Cases = dict[str, Case]

LIGHTNING = {"expanded": {}, "auxiliary": {"second_time": True}}
MODES = {"recorded": False, "recomputed": True}
SHARDED = {"mesh": [2], "units_in_blocks": False, "precision": "float64"}
JVP = SHARDED | {"step": "jvp", "function": "anchored", "accumulate": "", "compiled": False}
WATCHED = SHARDED | {"step": "watched", "precision": "float32"}


def of_each(networks: Iterable[str], name: str, case: Case, depth: int = 2) -> Cases:
    """The case with each network, in both modes."""
    cases: Cases = {}
    for network in networks:
        changes = {"depth": depth} if network in LIGHTNING else {"num_layers": depth}
        for mode, recompute in MODES.items():
            own = {"network": network, "changes": changes, "recompute": recompute}
            cases[f"{network}-{name}-{mode}"] = case | own
    return cases


FACM = {
    **of_each(LIGHTNING, "scratch", SHARDED | {"step": "facm", "has_teacher": False}),
    **of_each(LIGHTNING, "teacher", SHARDED | {"step": "facm", "has_teacher": True}),
}
PLATFORM = {
    f"platform-{mode}": FACM[f"expanded-teacher-{mode}"] | {"precision": "float32"}
    for mode in MODES
}
UNREDUCED = {"unreduced": FACM["expanded-scratch-recorded"] | {"mesh": None}}
EXACT = {
    **of_each([*LIGHTNING, *DIFFUSERS], "two-ranks", JVP),
    **of_each([*LIGHTNING, *DIFFUSERS], "three-ranks", JVP | {"mesh": [3], "function": "chain"}),
    **of_each(LIGHTNING, "two-replicas", JVP | {"mesh": [2, 1]}),
    **of_each(LIGHTNING, "two-replicas-of-two", JVP | {"mesh": [2, 2]}),
    **of_each(["expanded"], "two-batches", JVP | {"accumulate": "reduced twice"}),
    **of_each(["expanded", "dit"], "two-batches-at-once", JVP | {"accumulate": "reduced once"}),
    **of_each(["expanded"], "units-in-blocks", JVP | {"units_in_blocks": True}),
    **of_each(["expanded"], "compiled", JVP | {"compiled": True}),
}
BFLOAT16 = of_each(["expanded", *DIFFUSERS], "bfloat16", JVP | {"precision": "bfloat16"})
SHALLOW = of_each(["expanded", *DIFFUSERS], "shallow", WATCHED, depth=3)
DEEP = of_each(["expanded", *DIFFUSERS], "deep", WATCHED, depth=6)
ALL = FACM | PLATFORM | UNREDUCED | EXACT | BFLOAT16 | SHALLOW | DEEP


@pytest.fixture(scope="module")
def model_of(make_model: Any) -> Callable[[Case], Any]:
    def of(case: Case) -> Any:
        network, changes = case["network"], case["changes"]
        if network in LIGHTNING:
            return make_model(seed=1, **LIGHTNING[network], **changes)
        return tiny(network, seed=1, **changes)

    return of


@pytest.fixture(scope="module")
def teacher(make_model: Any) -> Any:
    return make_model(seed=2)


@pytest.fixture(scope="module")
def facm_batch(make_batch: Any) -> dict[str, Tensor]:
    """Rank 0 has guided rows only, rank 1 none: it must join the collectives all the same."""
    return make_batch() | {"dropped": torch.tensor([False, False, False, True, False, False])}


@cache
def jvp_batch(network: str) -> dict[str, Tensor]:
    """Every input of a JVP, by name; 12 rows: 2, 3 and 4 ranks have the same number each."""
    x, t, condition = tiny_batch("dit" if network in LIGHTNING else network, size=12)
    generator = torch.Generator().manual_seed(7)
    dx = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    dt, r = torch.rand(2, 12, generator=generator, dtype=x.dtype)
    batch = {"x": x, "t": t, "dx": dx, "dt": 2 * dt - 1}
    batch |= {"r": r} if network == "auxiliary" else {}
    return batch | ({"label": condition} if isinstance(condition, Tensor) else dict(condition))


@pytest.fixture(scope="module")
def results(
    model_of: Any, teacher: Any, facm_batch: Any, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """Cases of one world size share a launch."""

    def complete(case: Case) -> Case:
        model = model_of(case) if case["network"] in LIGHTNING else None
        return case | {
            "architecture": model and asdict(model.config),
            "weights": model and model.state_dict(),
            "teacher": teacher.state_dict() if case.get("has_teacher") else None,
            "batch": facm_batch if case["step"] == "facm" else jvp_batch(case["network"]),
        }

    by_size: dict[int, Cases] = {}
    for name, case in ALL.items():
        by_size.setdefault(math.prod(case["mesh"] or [2]), {})[name] = complete(case)
    script, found = Path(__file__).with_name("chain_ranks.py"), {}
    for size, cases in by_size.items():
        found |= run_ranks(script, cases, tmp_path_factory.mktemp(f"{size}_ranks"), size)
    return found


# --- FACM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_facm(
    model_of: Any, teacher: Any, facm_batch: Any, facm_oracle: Any
) -> Callable[[Case], tuple[float, dict[str, Tensor]]]:
    """Loss and gradients on the whole batch, by the formulas of the paper."""

    @cache
    def of(network: str, has_teacher: bool) -> tuple[float, dict[str, Tensor]]:
        student = model_of(FACM[f"{network}-teacher-recorded"])
        oracle = facm_oracle(auxiliary=network == "auxiliary", w=1.75)
        return oracle(student, teacher if has_teacher else None, facm_batch)

    return lambda case: of(case["network"], case["has_teacher"])


@pytest.mark.parametrize("name", FACM)
def test_facm_equals_one_process(
    name: str, results: Results, expected_facm: Any, assert_same: Any
) -> None:
    loss, gradients = expected_facm(FACM[name])
    for rank in results[name]:
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert_same(rank["gradients"], gradients, 1e-10)


@pytest.mark.parametrize("name", PLATFORM)
def test_facm_sharded_by_the_platform(
    name: str, results: Results, expected_facm: Any, assert_same: Any
) -> None:
    """Its `shard` keeps float32, so the comparison is as coarse."""
    loss, gradients = expected_facm(PLATFORM[name])
    for rank in results[name]:
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert_same(rank["gradients"], gradients, 1e-4)


def test_gradients_that_nobody_reduces_would_be_noticed(
    results: Results, expected_facm: Any, assert_same: Any
) -> None:
    ranks = [rank["gradients"] for rank in results["unreduced"]]
    _, gradients = expected_facm(UNREDUCED["unreduced"])
    for rank in ranks:
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(rank, gradients, 1e-2)
    # The mean over the ranks is all that is missing.
    mean = {name: (ranks[0][name] + ranks[1][name]) / 2 for name in gradients}
    assert_same(mean, gradients, 1e-10)


@pytest.mark.parametrize("name", FACM)
def test_ema_of_shards(
    name: str, model_of: Any, results: Results, expected_facm: Any, assert_same: Any
) -> None:
    """After a step of 6 images, 18 in all: between the weights before and after, shard by shard."""
    parameters = model_of(FACM[name]).named_parameters()
    before = {n: p.detach() for n, p in parameters if p.requires_grad}
    _, gradients = expected_facm(FACM[name])
    gamma = 1.826213779895858  # the root of (γ + 1) = 0.2²·(γ + 2)²·(γ + 3)
    beta = (1 - 6 / 18) ** (gamma + 1)
    moved = {n: -(1 - beta) * 0.1 * gradient for n, gradient in gradients.items()}
    for rank in results[name]:
        assert rank["ema_collectives"] == 0
        assert_same({n: rank["ema"][n] - before[n] for n in before}, moved, 1e-9)


# --- JVPs of any network ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_jvp(model_of: Any) -> Callable[[Case], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Outputs and gradients on the whole batch, from the whole network at once."""

    @cache
    def of(network: str, function: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = model_of(EXACT[f"{network}-two-ranks-recorded"])
        primals, tangents, condition, r = arguments(jvp_batch(network))
        with in_float64(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = torch.func.jvp(
                lambda x, t: model(x, t, condition, r), primals, tangents
            )
            outputs = {"value": value, "tangent": tangent}
            if function == "anchored":
                outputs["at_anchor"] = model(*anchor_of(*primals, condition, r))
            loss_of(outputs).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n: output.detach() for n, output in outputs.items()}, gradients

    return lambda case: of(case["network"], case["function"])


def output_error(ranks: list[dict[str, Any]], expected: dict[str, Tensor]) -> float:
    """The largest of an output, relative to its norm; the ranks' rows together."""
    got = {name: torch.cat([rank[name] for rank in ranks]).double() for name in expected}
    return float(torch.stack([(got[n] - e).norm() / e.norm() for n, e in expected.items()]).max())


def largest(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.norm() for x in tensors]).max()


def gradient_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of a parameter, relative to its gradient's norm or to 1e-4 of the largest norm.

    Some have no gradient: a constant added to every key changes no softmax.
    """
    assert got.keys() == expected.keys()
    floor = 1e-4 * largest(expected.values())
    errors = [(got[n] - e).norm() / e.norm().clamp(floor) for n, e in expected.items()]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_whole_network_in_one_process(
    name: str, results: Results, expected_jvp: Any
) -> None:
    outputs, gradients = expected_jvp(EXACT[name])
    assert output_error(results[name], outputs) < 1e-10
    for rank in results[name]:
        assert rank["is_sharded"]
        assert bool(rank["graphs"]) == EXACT[name]["compiled"]
        assert gradient_error(rank["gradients"], gradients) < 1e-10


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_like_the_platform(name: str, results: Results, expected_jvp: Any) -> None:
    """Rounded to eight bits many times over, except for times and what is made of them."""
    measured = {"expanded": 0.0080, "dit": 0.0142, "sd3": 0.0214, "wan": 0.0087}
    outputs, gradients = expected_jvp(BFLOAT16[name])
    error = output_error(results[name], outputs) / measured[BFLOAT16[name]["network"]]
    assert 0.5 < error < 1.3
    for rank in results[name]:
        assert rank["time_embedding_dtypes"] == ["torch.float32"]
        assert all(gradient.isfinite().all() for gradient in rank["gradients"].values())
        pairs = [(rank["gradients"][n].flatten(), e.flatten()) for n, e in gradients.items()]
        assert cosine(*map(torch.cat, zip(*pairs, strict=True))) > 0.999
        notable = 0.01 * largest(gradients.values())
        assert all(cosine(got, e) > 0.99 for got, e in pairs if e.norm() > notable)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


# --- what is unsharded, and when ----------------------------------------------------------------


@pytest.mark.parametrize("name", DEEP)
def test_each_block_is_called_and_gathered_once_for_both_tasks(name: str, results: Results) -> None:
    for rank in results[name]:
        assert rank["calls"] == [1] * 6
        assert rank["forward"] == [0, 1, 2, 3, 4, 5]
        assert rank["backward"] == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", ["expanded", *DIFFUSERS])
def test_two_blocks_at_most_are_whole_at_any_depth(
    network: str, mode: str, results: Results
) -> None:
    """One as parameters, one as the buffer of a gather. The root has the like of its own."""
    for shallow, deep in zip(
        results[f"{network}-shallow-{mode}"], results[f"{network}-deep-{mode}"], strict=True
    ):
        for rank in (shallow, deep):
            blocks = rank["peak"] / rank["block"]
            assert blocks <= 2, f"{blocks:.2f} blocks are whole at once"
            assert rank["peak_of_root"] == 2 * rank["root"]
        assert deep["peak"] == shallow["peak"]
