"""FACM under FSDP2 on two ranks against the float64 oracle of one process on the whole batch."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.ranks import Results, run_ranks

TEACHER = {False: "scratch", True: "teacher"}
MODE = {False: "recorded", True: "recomputed"}
CASES: dict[str, dict[str, Any]] = {
    f"{conditioning}-{TEACHER[has_teacher]}-{MODE[recompute]}": {
        "conditioning": conditioning,
        "has_teacher": has_teacher,
        "recompute": recompute,
        "spread": "float64",
    }
    for conditioning, has_teacher, recompute in product(["expanded", "auxiliary"], TEACHER, MODE)
}
PLATFORM = {
    f"platform-{mode}": CASES[f"expanded-teacher-{mode}"] | {"spread": "platform"}
    for mode in MODE.values()
}
UNREDUCED = {"unreduced": CASES["expanded-scratch-recorded"] | {"spread": "unreduced"}}
ALL = CASES | PLATFORM | UNREDUCED


@pytest.fixture(scope="module")
def models(make_model: Any) -> dict[str, tuple[Any, Any]]:
    """Case -> student and teacher."""
    return {
        name: (
            make_model(seed=1, second_time=case["conditioning"] == "auxiliary"),
            make_model(seed=2) if case["has_teacher"] else None,
        )
        for name, case in ALL.items()
    }


@pytest.fixture(scope="module")
def batch(make_batch: Any) -> dict[str, Tensor]:
    """Rank 0 has guided rows only, rank 1 none: it must join the collectives all the same."""
    return make_batch() | {"dropped": torch.tensor([False, False, False, True, False, False])}


@pytest.fixture(scope="module")
def results(
    models: dict[str, tuple[Any, Any]],
    batch: dict[str, Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    cases = {
        name: ALL[name]
        | {
            "architecture": asdict(student.config),
            "student": student.state_dict(),
            "teacher": teacher and teacher.state_dict(),
            "batch": batch,
        }
        for name, (student, teacher) in models.items()
    }
    script = Path(__file__).with_name("two_ranks.py")
    return run_ranks(script, cases, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="module")
def expected(
    models: dict[str, tuple[Any, Any]], batch: dict[str, Tensor], facm_oracle: Any
) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Case -> loss and gradients on the whole batch, in one process."""

    @cache
    def of(auxiliary: bool, has_teacher: bool) -> tuple[float, dict[str, Tensor]]:
        name = f"{'auxiliary' if auxiliary else 'expanded'}-{TEACHER[has_teacher]}-recorded"
        return facm_oracle(auxiliary=auxiliary, w=1.75)(*models[name], batch)

    return {
        name: of(case["conditioning"] == "auxiliary", case["has_teacher"])
        for name, case in ALL.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, results: Results, expected: Any, assert_same: Any) -> None:
    loss, gradients = expected[name]
    for rank in results[name]:
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert_same(rank["gradients"], gradients, 1e-10)


@pytest.mark.parametrize("name", PLATFORM)
def test_sharded_by_the_platform(
    name: str, results: Results, expected: Any, assert_same: Any
) -> None:
    """Its `shard` keeps float32, so the comparison is as coarse."""
    loss, gradients = expected[name]
    for rank in results[name]:
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-5)
        assert_same(rank["gradients"], gradients, 1e-4)


def test_gradients_that_nobody_reduces_would_be_noticed(
    results: Results, expected: Any, assert_same: Any
) -> None:
    ranks = [rank["gradients"] for rank in results["unreduced"]]
    _, gradients = expected["unreduced"]
    for rank in ranks:
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(rank, gradients, 1e-2)
    # The mean over the ranks is all that is missing.
    mean = {name: (ranks[0][name] + ranks[1][name]) / 2 for name in gradients}
    assert_same(mean, gradients, 1e-10)


@pytest.mark.parametrize("name", CASES)
def test_ema_of_shards(
    name: str, models: Any, results: Results, expected: Any, assert_same: Any
) -> None:
    """After a step of 6 images, 18 in all: between the weights before and after, shard by shard."""
    before = {n: p.detach() for n, p in models[name][0].named_parameters() if p.requires_grad}
    _, gradients = expected[name]
    gamma = 1.826213779895858  # the root of (γ + 1) = 0.2²·(γ + 2)²·(γ + 3)
    beta = (1 - 6 / 18) ** (gamma + 1)
    moved = {n: -(1 - beta) * 0.1 * gradient for n, gradient in gradients.items()}
    for rank in results[name]:
        assert rank["ema_collectives"] == 0
        assert_same({n: rank["ema"][n] - before[n] for n in before}, moved, 1e-9)
