"""Strict loading of published checkpoints, with an exact report."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from facm_core.errors import InvalidInputError

_SOURCES = ("ema", "emas", "model")
_POST_HOC_KEY = re.compile(r"ema_models\.(\d+)\.ema_model\.(.+)")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load did.

    Attributes:
        source: Where in the file the weights were, e.g. ``emas.ema_models.1``.
        loaded: Number of tensors loaded.
        left_in_file: Keys of the file that were not used, sorted.
    """

    source: str
    loaded: int
    left_in_file: tuple[str, ...]


def load_published_facm(
    model: nn.Module, path: str | Path, *, source: str | None = None, profile: int = 1
) -> LoadReport:
    """Load an official FACM or LightningDiT ``.pt`` into `model`, every key or none.

    The file is read with ``weights_only``: code in it is never executed.

    Args:
        model: A `LightningDiT` of the same size.
        path: The ``.pt`` file.
        source: ``ema``, ``emas`` (post-hoc EMA profiles) or ``model``; by default the first of
            these in the file.
        profile: Which profile of ``emas``; the published samples use 1.

    Raises:
        InvalidInputError: no such file or entry, or keys or shapes that differ (all are listed).
    """
    content = read_checkpoint(path)
    found = [name for name in _SOURCES if isinstance(content.get(name), Mapping)]
    chosen = source or next(iter(found), None)
    if chosen is None or chosen not in found:
        remedy = f"Use one of {', '.join(found)}" if found else "Give an official checkpoint"
        problem = f"the file's entries are {', '.join(map(str, content))}"
        raise InvalidInputError("source", source, problem, remedy)
    if chosen == "emas":
        name, weights = f"emas.ema_models.{profile}", _profile(content["emas"], profile)
    else:
        name, weights = chosen, dict(content[chosen])
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    load_strict(model, weights, origin=f"{path} ({name})")
    left = sorted(str(key) for key in content if key != chosen)
    return LoadReport(source=name, loaded=len(weights), left_in_file=tuple(left))


def load_strict(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict whose keys and shapes equal the model's exactly.

    Args:
        origin: Where the weights come from, for the message.

    Raises:
        InvalidInputError: with every missing key, unexpected key and differing shape.
    """
    problems = misfits(weights, model.state_dict())
    if problems:
        raise InvalidInputError(
            "weights",
            origin,
            f"do not fit the model: {'; '.join(problems)}",
            "Build the model with the configuration these weights were trained with",
        )
    model.load_state_dict(dict(weights))


def misfits(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Every missing key, unexpected key and differing shape of a state dict, in words."""
    problems = [f"missing {key}" for key in expected if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in expected]
    problems += [
        f"{key} has shape {tuple(weights[key].shape)}, the model {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    return problems


def read_checkpoint(path: str | Path, field: str = "path") -> Mapping[str, Any]:
    """The content of a ``.safetensors`` file, or of another as `torch.save` writes it.

    Such a file is read with ``weights_only``: code in it is never executed. Tensors are mapped
    where the file allows it, so that those nobody looks at are not read.

    Raises:
        InvalidInputError: no such file, or one of another kind; `field` is the one at fault.
    """
    if not Path(path).is_file():
        remedy = "Give the path of a checkpoint file"
        raise InvalidInputError(field, str(path), "no such file", remedy)
    problem, remedy = "not a checkpoint of tensors and plain values", "Give an official checkpoint"
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = zipfile.is_zipfile(path)  # the format of torch before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise InvalidInputError(field, str(path), problem, remedy) from error
    if not isinstance(content, Mapping):
        raise InvalidInputError(field, str(path), problem, remedy)
    return content


def _profile(emas: Mapping[str, Any], profile: int) -> dict[str, Tensor]:
    nested = emas.get("ema_models")
    if isinstance(nested, list):
        profiles = dict(enumerate(nested))
    else:
        profiles = {}
        for key, value in emas.items():
            match = _POST_HOC_KEY.fullmatch(key)
            if match:
                profiles.setdefault(int(match[1]), {})[match[2]] = value
    if profile not in profiles:
        remedy = f"Use one of {sorted(profiles)}"
        raise InvalidInputError("profile", profile, "no such EMA profile in the file", remedy)
    return dict(profiles[profile])
