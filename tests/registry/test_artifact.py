"""The model artefact: a round trip, and every way it can be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.models import LightningDiT, LightningDiTConfig
from facm_platform.registry import ArtifactConfig, load_artifact, read_artifact, save_artifact
from facm_platform.registry.artifact import CARD, CONFIG, WEIGHTS, write_artifact

ARCHITECTURE = LightningDiTConfig(
    input_size=4,
    in_channels=2,
    patch_size=2,
    hidden_size=8,
    depth=1,
    num_heads=1,
    num_classes=3,
    mlp_ratio=2.0,
)
DESCRIPTION = ArtifactConfig(
    role="student",
    architecture=ARCHITECTURE,
    objective="facm",
    conditioning="expanded",
    guidance_scale=1.75,
    guidance_low=0.125,
    recommended_nfe=(1, 2),
    normalisation_mean=(0.1, 1 / 3),
    normalisation_std=(2.0, 0.7),
    autoencoder_id="identity",
    autoencoder_sha256="a" * 64,
    latent_manifest_sha256="b" * 64,
    teacher_sha256="c" * 64,
    images_seen=10_000,
    ema_sigma_rel=0.05,
    config_hash="d" * 16,
)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LightningDiT(ARCHITECTURE).state_dict()


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "artifact", weights(), DESCRIPTION, readme="# Card\n")
    return tmp_path / "artifact"


def test_round_trip(folder: Path) -> None:
    state = torch.random.get_rng_state()
    artifact = load_artifact(str(folder))
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws nothing"
    assert artifact.config == DESCRIPTION
    assert artifact.config.guidance == GuidanceConfig(scale=1.75, low=0.125)
    assert artifact.config.latent_shape == (2, 4, 4)
    assert artifact.sha256 == json.loads((folder / CONFIG).read_text())["weights_sha256"]
    assert read_artifact(str(folder)) == artifact.info
    assert (folder / CARD).read_text() == "# Card\n"
    assert not artifact.model.training
    for name, tensor in weights().items():
        assert torch.equal(artifact.model.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in artifact.model.parameters())

    torch.manual_seed(0)
    fresh = LightningDiT(ARCHITECTURE).eval()
    inputs = torch.randn(3, 2, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    assert torch.equal(artifact.model(*inputs), fresh(*inputs))


def test_weights_are_stored_as_contiguous_float32(tmp_path: Path) -> None:
    odd = {name: tensor.double() for name, tensor in weights().items()}
    odd["pos_embed"] = odd["pos_embed"].transpose(1, 2).contiguous().transpose(1, 2)
    save_artifact(tmp_path, odd, DESCRIPTION)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}
    load_artifact(str(tmp_path))


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no such folder") as caught:
        load_artifact(str(tmp_path / "nothing"), "student_uri")
    assert caught.value.field == "student_uri"
    (folder / WEIGHTS).rename(tmp_path / "away")
    with pytest.raises(InvalidInputError, match=f"{WEIGHTS} is missing"):
        load_artifact(str(folder))
    (folder / CONFIG).unlink()
    with pytest.raises(InvalidInputError, match=f"{CONFIG} is missing"):
        load_artifact(str(folder))


@pytest.mark.parametrize("position", [9, -1])
def test_a_flipped_bit_is_noticed(folder: Path, position: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    for read in (load_artifact, read_artifact):
        with pytest.raises(InvalidInputError, match="damaged"):
            read(str(folder))


def test_every_wrong_tensor_is_listed(folder: Path) -> None:
    import hashlib

    tensors = load_file(folder / WEIGHTS)
    del tensors["t_embedder.mlp.0.bias"]
    tensors["more"] = torch.zeros(1)
    tensors["x_embedder.proj.bias"] = torch.zeros(5)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"].half()
    tensors["pos_embed"][0, 0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    change_config(folder, weights_sha256=digest)
    with pytest.raises(InvalidInputError) as caught:
        load_artifact(str(folder))
    problem = caught.value.problem
    with pytest.raises(InvalidInputError) as again:
        read_artifact(str(folder))
    assert str(again.value) == str(caught.value)
    for finding in (
        "missing t_embedder.mlp.0.bias",
        "unexpected more",
        "x_embedder.proj.bias is (5,) torch.float32, not (8,) torch.float32",
        "final_layer.linear.bias is (8,) torch.float16, not (8,) torch.float32",
        "pos_embed has values that are not finite",
    ):
        assert finding in problem
    with pytest.raises(InvalidInputError, match="unexpected more"):
        save_artifact(folder / "new", weights() | {"more": torch.zeros(1)}, DESCRIPTION)
    twice = [*weights().items(), ("x_embedder.proj.bias", torch.zeros(8))]
    with pytest.raises(InvalidInputError, match=r"architecture: x_embedder\.proj\.bias twice"):
        write_artifact(folder / "new", twice, DESCRIPTION)
    assert not list((folder / "new").iterdir()), "nothing is left of what was refused"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "reads version 1"),
        ({"role": "king"}, "role"),
        ({"objective": "gan"}, "objective"),
        ({"conditioning": "auxiliary"}, "second_time"),
        ({"conditioning": "none"}, "conditioning"),
        ({"recommended_nfe": []}, "recommended_nfe"),
        ({"normalisation_mean": [0.0]}, "expected 2 values"),
        ({"guidance_low": 2.0}, "interval"),
        ({"surprise": 1}, "surprise"),
        ({"architecture": {"kind": "unet"}}, "unknown architecture"),
        ({"architecture": {"kind": "lightning_dit"}}, "input_size"),
        ({"architecture": 3}, "cannot be read"),
    ],
)
def test_a_config_that_says_nonsense(folder: Path, changes: Any, message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(InvalidInputError, match=message):
        load_artifact(str(folder))


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / CONFIG).write_text("]")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_artifact(str(folder))
    with pytest.raises(InvalidInputError, match="role"):
        dataclasses.replace(DESCRIPTION, role="")
