"""MeanFlow and sCM under FSDP2 on two ranks against the float64 oracles of one process."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.core.oracles import MeanFlowOracle, SCMOracle
from tests.core.ranks import Results, run_ranks

OWN = "log_weight.weight"
DEFAULTS = {"is_sharded": True, "sharded_part": "", "second_time": False}
CASES: dict[str, dict[str, Any]] = {
    f"{objective}-{'teacher' if has_teacher else 'scratch'}-{mode}": {
        **DEFAULTS,
        "objective": objective,
        "second_time": objective == "mean_flow",
        "has_teacher": has_teacher,
        "recompute": mode == "recomputed",
        # sCM has nobody to ask for an unconditional velocity without a teacher.
        "w": 1.75 if has_teacher or objective == "mean_flow" else 1.0,
    }
    for objective, has_teacher, mode in product(
        ["mean_flow", "scm"], [False, True], ["recorded", "recomputed"]
    )
}
CASES["scm-second-time"] = CASES["scm-teacher-recorded"] | {"second_time": True}
CASES["scm-log-weight-alone"] = CASES["scm-teacher-recorded"] | {"sharded_part": "log_weight"}
UNREDUCED = {
    f"unreduced-{objective}": CASES[f"{objective}-teacher-recorded"] | {"is_sharded": False}
    for objective in ("mean_flow", "scm")
}
ALL = CASES | UNREDUCED

Models = dict[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def models(make_model: Any) -> Models:
    """Case -> student and teacher."""
    return {
        name: (
            make_model(seed=1, second_time=case["second_time"]),
            make_model(seed=2) if case["has_teacher"] else None,
        )
        for name, case in ALL.items()
    }


@pytest.fixture(scope="module")
def own() -> dict[str, Tensor]:
    """sCM's own parameters."""
    weight = torch.randn(128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {OWN: 0.1 * weight}


@pytest.fixture(scope="module")
def batches(make_batch: Any) -> dict[str, dict[str, Tensor]]:
    """Rank 0 has guided rows only, rank 1 none: it must join the collectives all the same."""
    batch = make_batch() | {"dropped": torch.tensor([False, False, False, True, False, False])}
    r = torch.tensor([0.5, 0.4, 1.0, 0.995, 0.06, 0.9], dtype=torch.float64)
    return {"mean_flow": batch | {"r": r}, "scm": batch}


@pytest.fixture(scope="module")
def results(
    models: Models, own: Any, batches: Any, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    cases = {
        name: ALL[name]
        | {
            "architecture": asdict(student.config),
            "student": student.state_dict(),
            "teacher": teacher and teacher.state_dict(),
            "own": own,
            "batch": batches[ALL[name]["objective"]],
        }
        for name, (student, teacher) in models.items()
    }
    script = Path(__file__).with_name("objective_ranks.py")
    return run_ranks(script, cases, tmp_path_factory.mktemp("objective_ranks"))


@pytest.fixture(scope="module")
def expected(models: Models, own: Any, batches: Any) -> dict[str, tuple[float, dict[str, Tensor]]]:
    """Case -> loss and gradients on the whole batch, in one process."""

    def of(name: str, objective: str, w: float, **_: Any) -> tuple[float, dict[str, Tensor]]:
        if objective == "mean_flow":
            return MeanFlowOracle(w=w)(*models[name], batches["mean_flow"])
        weights = {OWN: own[OWN].clone().requires_grad_()}
        return SCMOracle(w=w, warm=0.75)(*models[name], batches["scm"], **weights)

    return {name: of(name, **case) for name, case in ALL.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, results: Results, expected: Any, assert_same: Any) -> None:
    loss, gradients = expected[name]
    assert (OWN in gradients) == name.startswith("scm")
    for rank in results[name]:
        assert rank["is_sharded"]
        assert rank["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert_same(rank["gradients"], gradients, 1e-10)


@pytest.mark.parametrize("name", UNREDUCED)
def test_gradients_that_nobody_reduces_would_be_noticed(
    name: str, results: Results, expected: Any, assert_same: Any
) -> None:
    """The student's, and those of the objective's own weight."""
    ranks = [rank["gradients"] for rank in results[name]]
    _, gradients = expected[name]
    for part in (gradients.keys() - {OWN}, gradients.keys() & {OWN}):
        for rank in ranks if part else ():
            with pytest.raises(AssertionError, match="relative error"):
                assert_same(select(rank, part), select(gradients, part), 1e-2)
    # The mean over the ranks is all that is missing.
    mean = {n: (ranks[0][n] + ranks[1][n]) / 2 for n in gradients}
    assert_same(mean, gradients, 1e-10)


def select(tensors: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}
