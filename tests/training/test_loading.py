"""Weights read in shards: against torch's own loader, on two and four ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from facm_core.errors import InvalidInputError
from facm_core.models import adapt
from facm_platform.training.loading import Source, load_shards, parameters_on_meta
from facm_platform.training.parallel import Sharding
from tests.core.ranks import Results, run_ranks

SCRIPT = Path(__file__).with_name("loading_ranks.py")
CPU = torch.device("cpu")
MIB = 2**20

# No number of ranks here divides the 27, nor does 4 the 18 channels; the tables have one row.
NETWORK = {
    "num_attention_heads": 3,
    "attention_head_dim": 6,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 32,
    "ffn_dim": 27,
    "rope_max_seq_len": 16,
}
# Two experts of 67 MiB each in float32.
LARGER = NETWORK | {"num_attention_heads": 4, "attention_head_dim": 128} | {"ffn_dim": 2048}
LARGER |= {"num_layers": 4}
# Beside shard and tensor: modules, headers, the allocator's leftovers.
CONSTANT_BYTES = 8 * MIB


def publish(folder: Path, network: dict[str, int], dtype: torch.dtype, seed: int = 0) -> Path:
    """A network as the hub has it: diffusers' own files, of some tensors each, and their index."""
    torch.manual_seed(seed)
    wan = WanTransformer3DModel(**network).to(dtype)
    size = sum(parameter.nbytes for parameter in wan.parameters())
    wan.save_pretrained(folder, max_shard_size=size // 3)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def publish_experts(folder: Path, network: dict[str, int], dtype: torch.dtype) -> str:
    for seed, part in enumerate(("transformer", "transformer_2")):
        publish(folder / part, network, dtype, seed)
    return str(folder)


# --- the ranks ----------------------------------------------------------------------------------

FOUR = pytest.mark.slow
MESHES = [(2, 1), (2, 2), pytest.param(4, 1, marks=FOUR), pytest.param(4, 2, marks=FOUR)]
DTYPES = ["float32", "bfloat16"]
DAMAGED = ["tensors", "file"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is published."""
    root = tmp_path_factory.mktemp("published")
    for dtype in DTYPES:
        publish_experts(root / dtype, NETWORK, getattr(torch, dtype))
    return root


@pytest.fixture(scope="module")
def two(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What two ranks have found."""
    good = root / "float32" / "transformer"
    for damage in DAMAGED:
        shutil.copytree(good, root / damage)
    change(root / "tensors", spoil)
    max((root / "file").glob("*.safetensors")).unlink()
    refused: dict[str, dict[str, Any]] = {
        damage: {"what": "refused", "network": NETWORK, "folders": [str(good), str(root / damage)]}
        for damage in DAMAGED
    }
    publish_experts(root / "larger", LARGER, torch.bfloat16)
    memory = {
        name: {"what": "memory", "network": LARGER, "replicas": 1, "folder": str(root / "larger")}
        | {"whole": name == "whole", "warm_up": values_cases(root)["1-bfloat16"]}
        for name in ("shards", "whole")
    }
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(SCRIPT, memory | refused | values_cases(root), folder)


@pytest.fixture(scope="module")
def four(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What four ranks have found."""
    return run_ranks(SCRIPT, values_cases(root), tmp_path_factory.mktemp("ranks"), 4)


def values_cases(root: Path) -> dict[str, dict[str, Any]]:
    return {
        f"{replicas}-{dtype}": {"what": "values", "network": NETWORK}
        | {"replicas": replicas, "folder": str(root / dtype)}
        for replicas in (1, 2)
        for dtype in DTYPES
    }


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """`edit` the tensors of the first file."""
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def spoil(tensors: dict[str, Tensor]) -> None:
    """One tensor less, one more, one transposed."""
    del tensors["patch_embedding.bias"]
    tensors["extra"] = torch.zeros(3)
    name = "condition_embedder.text_embedder.linear_1.weight"
    tensors[name] = tensors[name].T.contiguous()


@pytest.fixture
def ranks_found(request: pytest.FixtureRequest, ranks: int) -> Results:
    return request.getfixturevalue("two" if ranks == 2 else "four")


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "replicas"), MESHES)
def test_shards_are_those_of_a_network_loaded_whole(
    ranks_found: Results, replicas: int, dtype: str
) -> None:
    """Bit for bit: parameters in float32 from either kind of file, buffers, velocities."""
    for rank in ranks_found[f"{replicas}-{dtype}"]:
        assert rank["got"].keys() == rank["expected"].keys()
        for name, expected in rank["expected"].items():
            assert rank["got"][name].dtype == expected.dtype == torch.float32, name
            assert torch.equal(rank["got"][name], expected), name
        assert rank["got"]["high_noise.null_text_embedding"].eq(0.25).all()
        got, expected = rank["velocities"]
        assert torch.equal(got, expected)
        assert got.abs().max() > 0


@pytest.mark.parametrize(("ranks", "replicas"), MESHES)
def test_the_ranks_of_a_replica_read_every_row_once(
    ranks_found: Results, ranks: int, replicas: int
) -> None:
    found = ranks_found[f"{replicas}-float32"]
    for replica in range(replicas):
        of_replica = found[replica * ranks // replicas :][: ranks // replicas]
        for name, whole in found[0]["whole_rows"].items():
            read = [row for rank in of_replica for row in rank["rows"][name]]
            assert read == list(range(whole)), name


# --- memory -------------------------------------------------------------------------------------


def test_a_rank_takes_its_shard_and_one_tensor(two: Results) -> None:
    for rank in two["shards"]:
        assert rank["shard"] > 60 * MIB
        assert rank["shard"] <= rank["peak"] <= rank["shard"] + rank["tensor"] + CONSTANT_BYTES


def test_a_network_loaded_whole_takes_more(two: Results) -> None:
    """So that the bound above is none that everything keeps."""
    for rank in two["whole"]:
        assert rank["peak"] > rank["shard"] + rank["tensor"] + 2 * CONSTANT_BYTES


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(root: Path) -> Path:
    return root / "float32" / "transformer"


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(published, tmp_path / "wan"))


@pytest.mark.parametrize("damage", DAMAGED)
def test_every_rank_is_told_what_one_of_them_has_found(
    two: Results, root: Path, damage: str
) -> None:
    first, second = two[damage]
    assert first == second
    assert first["untouched"]
    folder = root / damage
    expected = {
        "tensors": (
            f"weights = ['{folder}']: the tensors are not those of the network: missing "
            "network.patch_embedding.bias; network.condition_embedder.text_embedder.linear_1.weight"
            " is (12, 18), not (18, 12); unexpected network.extra. Give the weights"
        ),
        "file": f"weights = '{folder}/diffusion_pytorch_model.safetensors.index.json': it names "
        "files that are not there: ['diffusion_pytorch_model-0000",
    }
    assert first["error"].startswith(expected[damage])


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"00001-of-\d+.safetensors': cannot be read \(.*\). Copy the folder anew"),
    "no index": (lambda f: (f / INDEX).unlink(), r"not one .safetensors.index.json nor one"),
    "nothing": (shutil.rmtree, r"nor one .safetensors file, but \[\]"),
    "two": (lambda f: shutil.copy(f / INDEX, f / f"fp16_{INDEX}"), r"not one .* but .*'fp16_diff"),
    "json": (lambda f: (f / INDEX).write_text("{}"), r"cannot be read \(KeyError\('weight_map'\)"),
    "elsewhere": (
        lambda f: (f / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}})),
        r"files that are not there: \['../a.safetensors'\]",
    ),
    "twice": (
        lambda f: change(f, lambda t: t.update({"proj_out.bias": torch.zeros(16)})),
        r"network.proj_out.bias twice. Give the weights",
    ),
}


def sharded_wan() -> Any:
    with parameters_on_meta():
        model = adapt(WanTransformer3DModel(**NETWORK))
    return Sharding().apply(model, CPU)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(InvalidInputError, match=message):
        load_shards(sharded_wan(), CPU, Source(folder, "network.{}".format))


@pytest.mark.usefixtures("process_group")
def test_one_file_without_an_index(published: Path, tmp_path: Path) -> None:
    whole = {n: t for file in published.glob("*.safetensors") for n, t in load_file(file).items()}
    save_file(whole, tmp_path / "model.safetensors")
    model = sharded_wan()
    load_shards(model, CPU, Source(tmp_path, "network.{}".format))
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter.to_local(), whole[name]), name


@pytest.mark.usefixtures("process_group")
def test_a_network_that_has_values_gets_others(published: Path) -> None:
    model = sharded_wan()
    load_shards(model, CPU, Source(published, "network.{}".format))
    expected = {name: p.to_local().clone() for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load_shards(model, CPU, Source(published, "network.{}".format))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), expected[name]), name


# --- what is stored nowhere ---------------------------------------------------------------------


def test_buffers_are_made_for_real() -> None:
    with parameters_on_meta():
        model = WanTransformer3DModel(**NETWORK)
    expected = dict(WanTransformer3DModel(**NETWORK).named_buffers())
    assert expected.keys() == {"rope.freqs_cos", "rope.freqs_sin"}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not nn.Linear(2, 2).weight.is_meta


def test_parameters_stay_tied_and_frozen() -> None:
    with parameters_on_meta():
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        first.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    assert second.weight is first.weight
    assert first.weight.requires_grad
    assert not first.bias.requires_grad


@pytest.mark.usefixtures("process_group")
def test_a_buffer_that_would_have_no_value_is_missing(published: Path) -> None:
    with torch.device("meta"):
        model = Sharding().apply(adapt(WanTransformer3DModel(**NETWORK)), CPU)
    with pytest.raises(
        InvalidInputError, match=r": missing network.rope.freqs_cos; missing network.rope.freqs_sin"
    ):
        load_shards(model, CPU, Source(published, "network.{}".format))
