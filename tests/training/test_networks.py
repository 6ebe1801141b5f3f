"""Student and teacher in shards: the values of networks that were loaded whole, without their size.

On two ranks; the memory at a scaled-down depth and width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from facm_core.models import LightningDiT, WanConfig, build_network
from facm_platform.registry import save_artifact
from facm_platform.training.loading import initial_values
from tests.core.ranks import Results, run_ranks
from tests.small import ARCHITECTURE, artifact_config, write_model
from tests.tiny_wan import write_texts

SCRIPT = Path(__file__).with_name("networks_ranks.py")
MIB = 2**20
# Beside shards and tensor: modules, headers, the allocator's leftovers.
CONSTANT_BYTES = 8 * MIB

EXPERTS = WanConfig(
    height=4,
    width=4,
    in_channels=4,
    text_tokens=5,
    text_dim=12,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    ffn_dim=48,
    freq_dim=32,
    rope_max_seq_len=16,
    boundary=0.5,
)
# Two experts of 67 MiB each; a LightningDiT of 76.
LARGER = replace(EXPERTS, num_layers=4, num_attention_heads=4, attention_head_dim=128, ffn_dim=2048)
DIT = replace(ARCHITECTURE, input_size=4, in_channels=4, patch_size=2)
LARGER_DIT = replace(DIT, hidden_size=512, depth=4)

# Ends of names: tables and null prompts.
NOT_TRAINED = ("pos_embed", "freqs_cos", "freqs_sin", "null_text_embedding", "null_text_mask")

CASES: dict[str, dict[str, Any]] = {
    "same": {"teacher": "wan"},
    "one expert": {"teacher": "wan", "student": "low_noise"},
    "auxiliary": {"teacher": "dit", "auxiliary": True},
    # Of rank 1, so that the second worker's shards of A are empty.
    "adapters": {"teacher": "wan", "lora": {"rank": 1}},
    "adapted expert": {"teacher": "wan", "student": "high_noise", "lora": {"rank": 3}},
    "replicas": {"teacher": "wan", "train": {"replicas": 2}},
    "whole teacher": {"teacher": "dit", "train": {"shard_teacher": False}},
}
MEASURED = ("same", "one expert", "auxiliary", "adapted expert")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("artefacts")
    manifest = write_texts(root / "set")
    config = artifact_config(manifest, architecture=DIT, conditioning="plain")
    write_model(root / "dit", config)
    write_model(root / "larger-dit", replace(config, architecture=LARGER_DIT))
    for name, architecture in (("wan", EXPERTS), ("larger-wan", LARGER)):
        torch.manual_seed(0)
        weights = build_network(architecture).state_dict()
        weights = {n: torch.randn_like(t) if "null" in n else t for n, t in weights.items()}
        save_artifact(root / name, weights, replace(config, architecture=architecture))
    write_model(root / "damaged", config)
    damage(root / "damaged")

    def case(what: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
        defaults: dict[str, Any] = {"student": "same", "auxiliary": False, "train": {}}
        defaults |= {"lora": {}}
        places = {"uri": str(root / folder), "data": str(root / "set")}
        return defaults | options | places | {"what": what}

    cases = {
        f"memory {name} {'whole' if whole else 'shards'}": case(
            "memory", f"larger-{CASES[name]['teacher']}", CASES[name]
        )
        | {"whole": whole, "warm_up": {"uri": str(root / CASES[name]["teacher"])}}
        for name in MEASURED
        for whole in (False, True)
    }
    cases |= {name: case("values", options["teacher"], options) for name, options in CASES.items()}
    cases |= {"damaged": case("refused", "damaged", {})}
    return run_ranks(SCRIPT, cases, tmp_path_factory.mktemp("ranks"))


def damage(artifact: Path) -> None:
    """A value that is not finite, under the right hash."""
    file = artifact / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x80\x7f")
    values = json.loads((artifact / "config.json").read_text())
    values["weights_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (artifact / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", CASES)
def test_shards_are_those_of_networks_loaded_whole(results: Results, name: str) -> None:
    for rank in results[name]:
        for got, expected in zip(rank["got"], rank["expected"], strict=True):
            assert got.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(got[key], tensor), key
        student, teacher = rank["trained"]
        assert not teacher
        adapters = [key for key in rank["got"][0] if ".lora_" in key]
        assert bool(adapters) == name.startswith("adapt")
        frozen = rank["got"][0].keys() - set(student)
        if adapters:
            assert set(student) == set(adapters)
        else:
            assert all(key.endswith(NOT_TRAINED) for key in frozen), frozen
        assert rank["training"] == [True, False]


def test_one_rank_of_a_machine_verifies_the_file(results: Results) -> None:
    assert [rank["verified"] for rank in results["same"]] == [1, 0]


@pytest.mark.parametrize("name", MEASURED)
def test_a_rank_takes_its_shards_and_one_tensor(results: Results, name: str) -> None:
    for rank in results[f"memory {name} shards"]:
        assert rank["shards"] > 50 * MIB
        at_most = rank["shards"] + rank["tensor"] + CONSTANT_BYTES
        assert 0.99 * rank["shards"] <= rank["peak"] <= at_most


@pytest.mark.parametrize("name", MEASURED)
def test_networks_loaded_whole_take_more(results: Results, name: str) -> None:
    """So that the bound above is none that everything keeps."""
    for rank in results[f"memory {name} whole"]:
        assert rank["peak"] > rank["shards"] + rank["tensor"] + 2 * CONSTANT_BYTES


def test_every_rank_is_told_what_the_first_has_found(results: Results) -> None:
    first, second = results["damaged"]
    assert first == second
    assert "has values that are not finite" in first["error"]


def test_some_parameters_are_drawn_as_with_all_the_others() -> None:
    architecture = replace(ARCHITECTURE, second_time=True)
    torch.manual_seed(5)
    expected = LightningDiT(architecture)
    following = torch.rand(3)
    names = {name for name, _ in expected.named_parameters() if "r_embedder" in name}
    torch.manual_seed(5)
    got = initial_values(lambda: LightningDiT(architecture), names)
    assert torch.equal(torch.rand(3), following)
    assert got.keys() == names
    for name, value in got.items():
        assert torch.equal(value, expected.get_parameter(name)), name
    assert got["r_embedder.mlp.0.weight"].any()
