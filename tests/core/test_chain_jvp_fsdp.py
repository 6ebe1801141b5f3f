"""Chain-JVP and FACM under FSDP2, on several ranks, against one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.core.chain_ranks import anchor_point, arguments, loss_of
from tests.core.ranks import Results, run_ranks
from tests.core.tiny import NETWORKS as DIFFUSERS
from tests.core.tiny import in_float64, tiny, tiny_batch

Case = dict[str, Any]
Cases = dict[str, Case]

LIGHTNING = {"expanded": {}, "auxiliary": {"second_time": True}}
NETWORKS = [*LIGHTNING, *DIFFUSERS]
MODES = {"recorded": False, "recomputed": True}
SHARDED = {"mesh": [2], "precision": "float64", "changes": {}}
JVP = SHARDED | {"step": "jvp", "function": "anchored", "accumulate": "", "compiled": False}


def in_both_modes(name: str, case: Case) -> Cases:
    return {f"{name}-{mode}": case | {"recompute": MODES[mode]} for mode in MODES}


def over(name: str, networks: list[str], **settings: Any) -> Cases:
    """A JVP of each network in both modes."""
    cases: Cases = {}
    for network in networks:
        cases |= in_both_modes(f"{network}-{name}", JVP | {"network": network} | settings)
    return cases


FACM: Cases = {}
for network, has_teacher in product(LIGHTNING, [False, True]):
    case = SHARDED | {"step": "facm", "network": network, "has_teacher": has_teacher}
    FACM |= in_both_modes(f"{network}-{'teacher' if has_teacher else 'scratch'}", case)
PLATFORM = {
    f"platform-{mode}": FACM[f"expanded-teacher-{mode}"] | {"precision": "float32"}
    for mode in MODES
}
UNREDUCED = {"unreduced": FACM["expanded-scratch-recorded"] | {"mesh": None}}

EXACT = {
    **over("one-point", NETWORKS, function="chain"),
    **over("two-points", NETWORKS),
    **over("three-ranks", NETWORKS, mesh=[3]),
    **over("two-replicas", list(LIGHTNING), mesh=[2, 1]),
    **over("two-replicas-of-two", list(LIGHTNING), mesh=[2, 2]),
    **over("two-batches", ["expanded", "dit"], accumulate="synchronised"),
    **over("two-batches-reduced-once", ["expanded", "dit"], accumulate="unsynchronised"),
    **over("compiled", ["expanded"], compiled=True),
}
BFLOAT16 = over("bfloat16", NETWORKS, precision="bfloat16")
DEPTHS = (2, 6)
WATCHED: Cases = {}
for network, depth in product(NETWORKS, DEPTHS):
    changes = {"depth" if network in LIGHTNING else "num_layers": depth}
    case = {"step": "watched", "network": network, "changes": changes, "precision": "float32"}
    WATCHED |= in_both_modes(f"{network}-{depth}", SHARDED | case)
ALL = FACM | PLATFORM | UNREDUCED | EXACT | BFLOAT16 | WATCHED


def world_size(case: Case) -> int:
    size = 1
    for ranks in case["mesh"] or [2]:
        size *= ranks
    return size


@pytest.fixture(scope="module")
def model_of(make_model: Any) -> Callable[[Case], Any]:
    def of(case: Case) -> Any:
        name, changes = case["network"], case["changes"]
        if name in LIGHTNING:
            return make_model(seed=1, **LIGHTNING[name] | changes)
        return tiny(name, seed=1, **changes)

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
    """Every input of a JVP by name, for 12 rows: halves of 2, 3 or 4 ranks' shares are whole."""
    x, t, condition = tiny_batch("dit" if network in LIGHTNING else network, size=12)
    generator = torch.Generator().manual_seed(7)
    dx = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    dt, r = torch.rand(2, 12, generator=generator, dtype=x.dtype)
    batch = {"x": x, "t": t, "dx": dx, "dt": 2 * dt - 1}
    batch |= {"r": r} if network == "auxiliary" else {}
    return batch | ({"label": condition} if isinstance(condition, Tensor) else dict(condition))


@pytest.fixture(scope="module")
def results_of(
    model_of: Any, teacher: Any, facm_batch: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[dict[str, Any]]]:
    """What each rank found for a case; all cases of one world size share a launch."""

    def complete(case: Case) -> Case:
        is_lightning = case["network"] in LIGHTNING
        model = model_of(case) if is_lightning else None
        return case | {
            "architecture": model and asdict(model.config),
            "weights": model and model.state_dict(),
            "teacher": teacher.state_dict() if case.get("has_teacher") else None,
            "batch": facm_batch if case["step"] == "facm" else jvp_batch(case["network"]),
        }

    @cache
    def launch(size: int) -> Results:
        cases = {name: complete(case) for name, case in ALL.items() if world_size(case) == size}
        script = Path(__file__).with_name("chain_ranks.py")
        return run_ranks(script, cases, tmp_path_factory.mktemp(f"{size}_ranks"), size)

    return lambda name: launch(world_size(ALL[name]))[name]


# --- FACM ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_facm(
    model_of: Any, teacher: Any, facm_batch: Any, facm_oracle: Any
) -> Callable[[str], tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of a case on the whole batch, by the formulas of the paper."""

    @cache
    def of(network: str, has_teacher: bool) -> tuple[float, dict[str, Tensor]]:
        student = model_of(SHARDED | {"network": network})
        oracle = facm_oracle(auxiliary=network == "auxiliary", w=1.75)
        return oracle(student, teacher if has_teacher else None, facm_batch)

    return lambda name: of(ALL[name]["network"], ALL[name]["has_teacher"])


@pytest.mark.parametrize("name", FACM)
def test_facm_equals_one_process(
    name: str, results_of: Any, expected_facm: Any, assert_same: Any
) -> None:
    loss, gradients = expected_facm(name)
    for rank in results_of(name):
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert_same(rank["gradients"], gradients, 1e-10)


@pytest.mark.parametrize("name", PLATFORM)
def test_facm_sharded_by_the_platform(
    name: str, results_of: Any, expected_facm: Any, assert_same: Any
) -> None:
    """Its `shard` keeps float32, so the comparison is as coarse."""
    loss, gradients = expected_facm(name)
    for rank in results_of(name):
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert_same(rank["gradients"], gradients, 1e-4)


def test_gradients_that_nobody_reduces_would_be_noticed(
    results_of: Any, expected_facm: Any, assert_same: Any
) -> None:
    ranks = [rank["gradients"] for rank in results_of("unreduced")]
    _, gradients = expected_facm("unreduced")
    for rank in ranks:
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(rank, gradients, 1e-2)
    # The mean over the ranks is all that is missing.
    mean = {name: (ranks[0][name] + ranks[1][name]) / 2 for name in gradients}
    assert_same(mean, gradients, 1e-10)


@pytest.mark.parametrize("name", FACM)
def test_ema_of_shards(
    name: str, model_of: Any, results_of: Any, expected_facm: Any, assert_same: Any
) -> None:
    """After a step of 6 images, 18 in all: between the weights before and after, shard by shard."""
    parameters = model_of(FACM[name]).named_parameters()
    before = {n: p.detach() for n, p in parameters if p.requires_grad}
    _, gradients = expected_facm(name)
    gamma = 1.826213779895858  # the root of (γ + 1) = 0.2²·(γ + 2)²·(γ + 3)
    beta = (1 - 6 / 18) ** (gamma + 1)
    moved = {n: -(1 - beta) * 0.1 * gradient for n, gradient in gradients.items()}
    for rank in results_of(name):
        assert rank["ema_collectives"] == 0
        assert_same({n: rank["ema"][n] - before[n] for n in before}, moved, 1e-9)


# --- any network --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_jvp(model_of: Any) -> Callable[[str], dict[str, Any]]:
    """Results and gradients of a case on the whole batch, from the whole network at once."""

    @cache
    def of(network: str, function: str) -> dict[str, Any]:
        model, batch = model_of(SHARDED | {"network": network}), jvp_batch(network)
        primals, tangents, condition, r = arguments(batch)
        with in_float64(), sdpa_kernel(SDPBackend.MATH):
            value, tangent = torch.func.jvp(
                lambda x, t: model(x, t, condition, r), primals, tangents
            )
            found = {"value": value, "tangent": tangent.detach()}
            if function == "anchored":
                found["at_anchor"] = model(*anchor_point(batch))
            loss_of(found).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {n: x.detach() for n, x in found.items()} | {"gradients": gradients}

    return lambda name: of(ALL[name]["network"], ALL[name]["function"])


def whole_batch(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([rank[name] for rank in ranks]).double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of a tensor, relative to its norm or to 1e-4 of the largest one's.

    Some parameters have no gradient: a constant added to every key changes no softmax.
    """
    assert got.keys() == expected.keys()
    floor = 1e-4 * max(float(e.norm()) for e in expected.values())
    return max(
        (float((got[n] - e).norm()) / max(float(e.norm()), floor), n) for n, e in expected.items()
    )


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_whole_network_in_one_process(
    name: str, results_of: Any, expected_jvp: Any
) -> None:
    ranks, expected = results_of(name), expected_jvp(name)
    for output in expected.keys() - {"gradients"}:
        assert relative_error(whole_batch(ranks, output), expected[output]) < 1e-10
    for rank in ranks:
        assert rank["is_sharded"]
        assert worst(rank["gradients"], expected["gradients"]) < (1e-10, "")
        assert bool(rank["graphs"]) == ALL[name]["compiled"]


# --- mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_like_the_platform(name: str, results_of: Any, expected_jvp: Any) -> None:
    ranks, expected = results_of(name), expected_jvp(name)
    e = {
        o: relative_error(whole_batch(ranks, o), expected[o])
        for o in expected.keys() - {"gradients"}
    }
    g = ranks[0]["gradients"]
    w = expected["gradients"]
    big = max(x.norm() for x in w.values())
    cos = sorted(
        (float((g[n].flatten() @ x.flatten()) / g[n].norm() / x.norm()), float(x.norm() / big), n)
        for n, x in w.items()
        if x.norm() > 1e-10 * big
    )
    print(name, e, ranks[0]["time_embedding_dtypes"], cos[:4])


@pytest.mark.parametrize("name", WATCHED)
def test_watch(name, results_of):
    rank = results_of(name)[0]
    print(name, rank, rank["peak"] / rank["block"])
