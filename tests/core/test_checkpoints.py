"""Published checkpoints: where the weights are in the file, strictness, and hostile files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.checkpoints import LoadReport, load_published_facm, load_strict
from facm_core.errors import InvalidInputError

Weights = dict[str, Tensor]
KEYS = 29 + 14  # of a LightningDiT of depth 2


@pytest.fixture
def weights(make_model: Any) -> Weights:
    return make_model(seed=1).state_dict()


@pytest.fixture
def others(make_model: Any) -> Weights:
    return make_model(seed=2).state_dict()


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        torch.save(content, tmp_path / "published.pt")
        return tmp_path / "published.pt"

    return save


def flattened(profiles: list[Weights]) -> Weights:
    """As `ema_pytorch` saves its post-hoc profiles, with their counters."""
    flat: Weights = {"step": torch.tensor(7)}
    for i, profile in enumerate(profiles):
        flat |= {f"ema_models.{i}.ema_model.{name}": value for name, value in profile.items()}
        flat |= {f"ema_models.{i}.initted": torch.tensor(True)}
    return flat


def prefixed(weights: Weights) -> Weights:
    return {f"module.{name}": value for name, value in weights.items()}


LAYOUTS: dict[str, tuple[str, Callable[[Weights, Weights], dict[str, Any]]]] = {
    "ema": ("ema", lambda right, wrong: {"model": wrong, "ema": right}),
    "model": ("model", lambda right, wrong: {"model": right}),
    "module prefix": ("ema", lambda right, wrong: {"model": wrong, "ema": prefixed(right)}),
    "nested": (
        "emas.ema_models.1",
        lambda right, wrong: {"model": wrong, "emas": {"ema_models": [wrong, right]}},
    ),
    "flattened": (
        "emas.ema_models.1",
        lambda right, wrong: {"model": wrong, "emas": flattened([wrong, right])},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(
    layout: str, weights: Weights, others: Weights, make_model: Any, save: Any
) -> None:
    source, build = LAYOUTS[layout]
    content = build(weights, others) | {
        "args": argparse.Namespace(cfgw=1.75, epochs=200),
        "opt": {"state": {}, "param_groups": []},
        "train_steps": 100_000,
    }
    model = make_model(seed=3)
    report = load_published_facm(model, save(content))
    chosen = source.partition(".")[0]
    left = tuple(sorted(set(content) - {chosen}))
    assert report == LoadReport(source=source, loaded=KEYS, left_in_file=left)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_source_and_a_profile_can_be_asked_for(
    weights: Weights, others: Weights, make_model: Any, save: Any
) -> None:
    path = save({"ema": others, "model": others, "emas": flattened([weights, others])})
    model = make_model(seed=3)
    report = load_published_facm(model, path, source="emas", profile=0)
    assert report.source == "emas.ema_models.0"
    assert report.left_in_file == ("ema", "model")
    assert torch.equal(model.state_dict()["pos_embed"], weights["pos_embed"])
    name = "blocks.1.mlp.w3.weight"
    assert torch.equal(model.state_dict()[name], weights[name])
    with pytest.raises(InvalidInputError, match=r"profile = 2: .* Use one of \[0, 1\]"):
        load_published_facm(model, path, source="emas", profile=2)


def test_every_misfit_is_listed_and_nothing_is_loaded(
    weights: Weights, make_model: Any, save: Any
) -> None:
    del weights["pos_embed"], weights["blocks.0.norm1.weight"]
    weights["blocks.2.norm1.weight"] = torch.zeros(16)
    weights["final_layer.linear.bias"] = torch.zeros(5)
    model = make_model(seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidInputError) as caught:
        load_published_facm(model, save({"ema": weights}))
    for part in (
        "published.pt (ema)",
        "missing pos_embed",
        "missing blocks.0.norm1.weight",
        "unexpected blocks.2.norm1.weight",
        "final_layer.linear.bias has shape (5,), the model (12,)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_another_kind(weights: Weights, make_model: Any, save: Any) -> None:
    model = make_model()
    with pytest.raises(InvalidInputError, match="entries are weights, step"):
        load_published_facm(model, save({"weights": weights, "step": 3}))
    with pytest.raises(InvalidInputError, match=r"source = 'emas'.*Use one of ema, model"):
        load_published_facm(model, save({"ema": weights, "model": weights}), source="emas")
    with pytest.raises(InvalidInputError, match="no such file"):
        load_published_facm(model, "nowhere.pt")


class Hostile:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_executed(
    zipped: bool, weights: Weights, make_model: Any, tmp_path: Path
) -> None:
    victim, path = tmp_path / "executed", tmp_path / "hostile.pt"
    content = {"ema": weights, "args": Hostile(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = make_model(seed=3)
    before = model.state_dict()["final_layer.linear.bias"].clone()
    with pytest.raises(InvalidInputError, match=r"hostile.pt.*not a checkpoint of tensors"):
        load_published_facm(model, path)
    assert not victim.exists()
    assert torch.equal(model.state_dict()["final_layer.linear.bias"], before)
    # Not for want of trying: whoever trusts the file runs it.
    torch.load(path, weights_only=False)
    assert victim.exists()


def test_nothing_stays_allowed_after_a_load(weights: Weights, make_model: Any, save: Any) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    load_published_facm(make_model(), save({"ema": weights, "args": argparse.Namespace()}))
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_load_strict_takes_its_own(weights: Weights, make_model: Any) -> None:
    model = make_model(seed=3)
    load_strict(model, weights, origin="here")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with pytest.raises(InvalidInputError, match=r"weights = 'here'.*missing pos_embed"):
        load_strict(model, {}, origin="here")


def test_a_file_of_something_else_is_refused(make_model: Any, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InvalidInputError, match=r"list.pt.*not a checkpoint of tensors"):
        load_published_facm(make_model(seed=3), tmp_path / "list.pt")
