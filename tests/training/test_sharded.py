"""Averages of shards, and replicas that differ: on two ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from facm_core.ema import PowerEMA
from facm_core.models import LightningDiT
from tests.core.ranks import Results, run_ranks
from tests.small import ARCHITECTURE

SIGMA_RELS = (0.05, 0.2)
BLOCK = "blocks.1.attn.proj.weight"


@pytest.fixture(scope="module")
def steps() -> list[dict[str, torch.Tensor]]:
    """The weights after each of five steps."""
    random = torch.Generator().manual_seed(0)
    parameters = dict(LightningDiT(ARCHITECTURE).named_parameters())
    return [
        {name: torch.randn(p.shape, generator=random) for name, p in parameters.items()}
        for _ in range(5)
    ]


@pytest.fixture(scope="module")
def results(steps: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    common = {"architecture": asdict(ARCHITECTURE), "steps": steps}
    cases: dict[str, dict[str, Any]] = {
        f"ema-{replicas}": common
        | {"what": "ema", "replicas": replicas, "sigma_rels": list(SIGMA_RELS)}
        for replicas in (1, 2)
    }
    for case, replicas, name in (
        ("replicated-block", 2, BLOCK),
        ("sharded-block", 1, BLOCK),
        ("plain", 1, "plain"),
    ):
        cases[case] = common | {"what": "replicas", "replicas": replicas, "name": name}
    script = Path(__file__).with_name("sharded_ranks.py")
    return run_ranks(script, cases, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("replicas", [1, 2])
def test_averages_of_shards_are_the_average_bit_for_bit(
    results: Results, steps: list[dict[str, torch.Tensor]], replicas: int
) -> None:
    model = LightningDiT(ARCHITECTURE)
    model.load_state_dict(steps[0], strict=False)
    ema = PowerEMA(model, SIGMA_RELS)
    for number, weights in enumerate(steps, start=1):
        model.load_state_dict(weights, strict=False)
        ema.update(model, images_seen=8 * number, images_step=8)
    for rank in results[f"ema-{replicas}"]:
        for sigma_rel, expected in ema.profiles.items():
            for name, average in expected.items():
                assert torch.equal(rank[sigma_rel][name], average), name


@pytest.mark.parametrize(
    ("case", "noticed"),
    # Nobody else holds the shard that changed in the second.
    [("replicated-block", [1]), ("sharded-block", []), ("plain", [1])],
)
def test_a_replica_that_differs_is_named(results: Results, case: str, noticed: list[int]) -> None:
    for rank in results[case]:
        assert rank == {"before": [], "after": noticed}
