"""Weights written tensor by tensor: the bytes of safetensors' own writer, in little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from facm_platform.registry.weights import WeightsWriter
from tests.core.ranks import Results, run_ranks

SCRIPT = Path(__file__).with_name("weights_rank.py")
MIB = 2**20

TENSORS = {
    "b.weight": torch.arange(12.0).reshape(3, 4).T,
    "a.weight": torch.tensor(0.5),
    "blocks.10.x": torch.zeros(0, 3),
    "blocks.2.x": torch.ones(5),
    "ä": torch.full((1,), 2.0),
}


@pytest.mark.parametrize("reverse", [False, True])
def test_the_bytes_are_those_of_safetensors(tmp_path: Path, reverse: bool) -> None:
    """Whatever the order in which the tensors come."""
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "expected")
    with (tmp_path / "got").open("wb") as file:
        writer = WeightsWriter(file, {name: tuple(t.shape) for name, t in TENSORS.items()})
        for name in sorted(TENSORS, reverse=reverse):
            writer.write(name, TENSORS[name])
    assert (tmp_path / "got").read_bytes() == (tmp_path / "expected").read_bytes()
    got = load_file(tmp_path / "got")
    assert all(torch.equal(got[name], tensor) for name, tensor in TENSORS.items())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Peaks of a process that imports a pair of experts and looks at the teacher."""
    folder = tmp_path_factory.mktemp("wan")
    case = {"what": "memory", "folder": str(folder)}
    return run_ranks(SCRIPT, {"memory": case}, tmp_path_factory.mktemp("rank"), world_size=1)


@pytest.mark.parametrize("what", ["import", "read"])
def test_one_tensor_is_in_memory_at_a_time(measured: Results, what: str) -> None:
    (found,) = measured["memory"]
    assert found["weights"] > 100 * MIB
    assert found[what] <= found["tensor"] + 8 * MIB


def test_a_teacher_that_is_loaded_is_in_memory(measured: Results) -> None:
    """So that the bound above is none that everything keeps."""
    (found,) = measured["memory"]
    assert found["held"] > found["weights"] / 2
