"""Flow matching against its loss written by hand, one sample at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.objectives import FlowMatching, FlowMatchingConfig


class Recorder:
    """Remembers what a model was asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.second_time = model, model.second_time
        self.null_condition = model.null_condition

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, r: Tensor | None) -> Tensor:
        self.x, self.t, self.condition, self.r = x, t, condition, r
        return self.model(x, t, condition, r)


def evaluate(objective: FlowMatching, model: Any, batch: dict[str, Tensor]) -> Any:
    given = dict(batch)
    return objective(model, given.pop("x_1"), given.pop("condition"), **given)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_loss_and_gradients(
    weight: float, expanded: bool, channels: int, make_model: Any, make_batch: Any, assert_same: Any
) -> None:
    model, batch = make_model(seed=1, in_channels=channels), make_batch(channels)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    losses = []
    for i, sample in enumerate(zip(*batch.values(), strict=True)):
        x_1, label, x_0, t, dropped = sample
        time = 2 - t if expanded and i % 2 == 1 else t
        x_t = t * x_1 + (1 - t) * x_0
        f = model(x_t[None], time[None], torch.tensor([5]) if dropped else label[None])[0]
        a, b = f.flatten(1), (x_1 - x_0).flatten(1)
        square = ((a - b) ** 2).mean()
        if channels == 1:
            a, b = a.T, b.T
        cosine = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))
        losses.append(square + weight * (1 - cosine).mean())
    expected = torch.stack(losses).mean()
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    objective = FlowMatching(FlowMatchingConfig(expanded=expanded, lambda_cosine=weight))
    output = evaluate(objective, model, batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    got = {name: p.grad for name, p in parameters.items()}
    assert_same(got, dict(zip(parameters, gradients, strict=True)), 1e-10)
    whole = output.metrics["loss_mse"] + weight * output.metrics["loss_cosine"]
    assert whole.item() == pytest.approx(expected.item(), rel=1e-12)


def test_half_the_rows_are_asked_in_the_anchor_domain(make_model: Any, make_batch: Any) -> None:
    model, batch = Recorder(make_model()), make_batch()
    evaluate(FlowMatching(FlowMatchingConfig()), model, batch)
    t = batch["t"]
    mirrored = torch.isclose(model.t, 2 - t)
    assert int(mirrored.sum()) == 3
    assert torch.equal(model.t[~mirrored], t[~mirrored])
    # The point itself is at t in every row, and dropped rows have the null label.
    x_t = t.view(-1, 1, 1, 1) * batch["x_1"] + (1 - t.view(-1, 1, 1, 1)) * batch["x_0"]
    torch.testing.assert_close(model.x, x_t)
    assert model.condition.tolist() == [0, 4, 5, 3, 1, 5]
    assert model.r is None


def test_a_second_time_is_told_t(make_model: Any, make_batch: Any) -> None:
    model, batch = Recorder(make_model(second_time=True)), make_batch()
    evaluate(FlowMatching(FlowMatchingConfig(expanded=False)), model, batch)
    assert torch.equal(model.t, batch["t"])
    assert torch.equal(model.r, batch["t"])


def test_a_perfect_network_has_no_loss(make_batch: Any) -> None:
    class Perfect:
        second_time = False

        def __call__(self, x: Tensor, t: Tensor, condition: Tensor, r: None) -> Tensor:
            return batch["x_1"] - batch["x_0"]

        def null_condition(self, condition: Tensor) -> Tensor:
            return condition

    batch = make_batch()
    objective = FlowMatching(FlowMatchingConfig(lambda_cosine=1.0))
    assert evaluate(objective, Perfect(), batch).loss.item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    ("field", "value"), [("lambda_cosine", -0.1), ("label_dropout", 1.0), ("label_dropout", -1.0)]
)
def test_bad_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        FlowMatchingConfig(**{field: value})


def test_times_are_logit_normal_by_default() -> None:
    t = FlowMatching(FlowMatchingConfig()).draw((100_000,), torch.Generator().manual_seed(0)).t
    z = torch.logit(t.double())
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * len(z))


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_together_see_what_one_sees(workers: int, make_model: Any, make_batch: Any) -> None:
    """Every second row of the whole batch is mirrored, whoever has it."""
    model, x_1 = make_model(seed=1), make_batch()["x_1"].repeat(2, 1, 1, 1)[:6]
    labels = torch.arange(6) % 3
    objective = FlowMatching(FlowMatchingConfig())
    draws = objective.draw(tuple(x_1.shape), torch.Generator().manual_seed(0))
    whole = objective(model, x_1, labels, **draws.given()).loss
    shares = [
        objective(model, x_1[w::workers], labels[w::workers], **draws[w::workers].given())
        for w in range(workers)
    ]
    assert torch.stack([share.loss for share in shares]).mean().item() == pytest.approx(
        whole.item(), rel=1e-9
    )
