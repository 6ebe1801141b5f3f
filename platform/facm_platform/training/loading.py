"""Published weights, of which every rank reads its own shard and nothing else.

    with parameters_on_meta():
        model = Experts(build(), build(), boundary=0.875)
    model = sharding.apply(model, device)
    load_shards(
        model,
        sharding.home(device),
        Source(folder / "transformer", "high_noise.network.{}".format),
        Source(folder / "transformer_2", "low_noise.network.{}".format),
    )

Files are mapped into memory, not read: of each tensor the rows of this rank's shard are copied to
where they belong and converted on the way, so that beside its shard a rank holds one piece of one
tensor at most. The shards of one replica have no row in common, so together they read each byte
once (`local_rows`); what is not sharded, the buffers, is read by every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from facm_core.errors import InvalidInputError, require
from facm_platform.training.parallel import Group, agreed, local, local_rows

_FIELD, _INDEX = "weights", ".safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """Published weights.

    Attributes:
        folder: On this machine (of an object store's, `node_copy` makes one). In it lie one
            ``.safetensors`` file, or those that one ``.safetensors.index.json`` names.
        rename: From a tensor's name there to its name in the model; None for one that is not read.
    """

    folder: Path
    rename: Callable[[str], str | None] = str


class _Stored(NamedTuple):
    file: Path
    name: str
    shape: tuple[int, ...]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have parameters without storage, and buffers with values.

    A buffer that is stored nowhere, such as a table of rotary embeddings, is right by that. Nothing
    is initialised: a parameter loses its storage before its module fills it.
    """

    with _parameters_become(_on_meta):
        yield


def initial_values(build: Callable[[], nn.Module], names: Collection[str]) -> dict[str, Tensor]:
    """Of the parameters `names` of ``build()``: what they are when all the others are drawn too.

    The others share the memory of the largest. `build` must make its parameters, in float32, in the
    same order each time; without `names`, it is not called.
    """
    if not names:
        return {}
    made: list[nn.Parameter] = []

    def noted(parameter: nn.Parameter) -> nn.Parameter:
        made.append(_on_meta(parameter))
        return made[-1]

    with torch.random.fork_rng(devices=[]), _parameters_become(noted):
        wanted = {id(p) for name, p in build().named_parameters() if name in names}
    scratch, turn = torch.empty(max(p.numel() for p in made)), iter(made)

    def with_storage(parameter: nn.Parameter) -> nn.Parameter:
        if id(next(turn)) in wanted:
            return parameter
        return _with_data(parameter, scratch[: parameter.numel()].view(parameter.shape))

    with _parameters_become(with_storage):
        model = build()
    return {name: p.detach() for name, p in model.named_parameters() if name in names}


@contextmanager
def _parameters_become(change: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Whenever a module gets a parameter, before it is filled."""
    # Its annotation leaves out that the hook may give another parameter.
    hook = register_module_parameter_registration_hook(cast(Any, lambda _, __, p: change(p)))
    try:
        yield
    finally:
        hook.remove()


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.is_meta:  # and perhaps another module's, too
        return parameter
    return _with_data(parameter, parameter.detach().to("meta"))


def _with_data(parameter: nn.Parameter, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def load_shards(
    model: nn.Module,
    device: torch.device,
    *sources: Source,
    others: Mapping[str, Tensor] | None = None,
    group: Group = None,
) -> None:
    """Fill `model`, which `Sharding.apply` has sharded, from `sources`. A collective.

    What is on the meta device gets its storage on `device`. The sources must hold every parameter
    and every buffer on the meta device, and nothing that is not in the model's state dict; another
    buffer keeps its value where they do not hold it.

    `others`: values of parameters that the sources need not hold, the same on every rank.

    Raises:
        InvalidInputError: the same on every rank, before anything is changed; a file is missing or
            cannot be read, or tensors are missing, unexpected or of another shape: all are listed.
    """
    others = others or {}
    stored = agreed(lambda: _checked(model, sources, others), group)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    targets = model.state_dict()
    for file, tensors in groupby(stored.items(), lambda item: item[1].file):
        with safe_open(file, framework="pt") as opened:
            for name, found in tensors:
                target = targets[name]
                if isinstance(target, DTensor):
                    local(target).copy_(opened.get_slice(found.name)[local_rows(target)])
                else:
                    target.copy_(opened.get_tensor(found.name))
    for name, value in others.items():
        local(targets[name]).copy_(value[local_rows(targets[name])])


def _checked(
    model: nn.Module, sources: tuple[Source, ...], others: Collection[str]
) -> dict[str, _Stored]:
    """Where each tensor of the model lies, file by file."""
    expected: dict[str, Tensor] = model.state_dict()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    stored: dict[str, _Stored] = {}
    findings = []
    for name, found in _contents(sources):
        if name in stored:
            findings.append(f"{name} twice")
        elif name not in expected:
            findings.append(f"unexpected {name}")
        elif found.shape != tuple(expected[name].shape):
            findings.append(f"{name} is {found.shape}, not {tuple(expected[name].shape)}")
        stored[name] = found
    findings += [
        f"missing {name}"
        for name, tensor in (dict(model.named_buffers()) | expected).items()
        if name not in stored and name not in others and (name in parameters or tensor.is_meta)
    ]
    require(
        not findings,
        _FIELD,
        [str(source.folder) for source in sources],
        "the tensors are not those of the network: " + "; ".join(sorted(findings)),
        "Give the weights of the architecture that was configured",
    )
    return stored


def _contents(sources: tuple[Source, ...]) -> Iterator[tuple[str, _Stored]]:
    """The model's name of every stored tensor, and where it lies: from the files' headers."""
    for source in sources:
        for file in _files(source.folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (it is no dict)
                        renamed = source.rename(name)
                        if renamed is not None:
                            shape = tuple(opened.get_slice(name).get_shape())
                            yield renamed, _Stored(file, name, shape)
            except SafetensorError as error:
                raise _unusable(file, f"cannot be read ({error})") from error


def _files(folder: Path) -> list[Path]:
    """The ``.safetensors`` files that belong together."""
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    indices = sorted(name for name in there if name.endswith(_INDEX))
    names = sorted(name for name in there if name.endswith(".safetensors"))
    if len(indices) == 1:
        names = _indexed(folder / indices[0])
        lacking = [name for name in names if name not in there]
        if lacking:
            raise _unusable(folder / indices[0], f"it names files that are not there: {lacking}")
    elif indices or len(names) != 1:
        raise _unusable(
            folder, f"not one {_INDEX} nor one .safetensors file, but {indices + names}"
        )
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(index, f"cannot be read ({error!r})") from error


def _unusable(path: Path, problem: str) -> InvalidInputError:
    remedy = "Copy the folder anew from where it was published"
    return InvalidInputError(_FIELD, str(path), problem, remedy)
