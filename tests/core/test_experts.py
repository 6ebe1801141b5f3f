"""Two experts as one field: against diffusers' own pipeline, and rows of mixed times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor, nn

from facm_core.errors import InvalidInputError
from facm_core.jvp import anchored_jvp
from facm_core.models.base import Condition, select_rows
from facm_core.models.experts import Experts
from tests.core.tiny import tiny, tiny_batch

BOUNDARY = 0.875


@pytest.fixture
def experts() -> Experts:
    return Experts(tiny("wan", seed=1), tiny("wan", seed=2), boundary=BOUNDARY)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_steps_equal_those_of_diffusers_across_the_boundary(
    experts: Experts, guidance_scale: float
) -> None:
    """With Wan's shift of 3: noise levels on both sides of the boundary."""
    x, _, condition = tiny_batch("wan")
    text = condition["text_embedding"]
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=experts.high_noise.network,
        transformer_2=experts.low_noise.network,
        boundary_ratio=BOUNDARY,
    )
    pipeline.set_progress_bar_config(disable=True)
    null = experts.null_condition({"text_embedding": text})["text_embedding"]
    (expected,) = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=null,
        height=32,
        width=32,
        num_frames=1,
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        latents=x[:, :, None],
        output_type="latent",
        return_dict=False,
    )
    sigmas = pipeline.scheduler.sigmas
    used = {bool(sigma >= BOUNDARY) for sigma in sigmas[:-1]}
    assert used == {True, False}, "both experts have steps"
    got = x
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            t = (1 - sigma).expand(len(x))
            velocity = experts(got, t, {"text_embedding": text})
            if guidance_scale != 1:
                unguided = experts(got, t, {"text_embedding": null})
                velocity = unguided + guidance_scale * (velocity - unguided)
            got = got + (sigma - following) * velocity
    torch.testing.assert_close(got, expected[:, :, 0], rtol=1e-5, atol=1e-5)


def test_each_row_is_its_experts(experts: Experts) -> None:
    """At the boundary itself the high-noise one's, in both halves of the expanded interval."""
    x, _, condition = tiny_batch("wan", size=8)
    t = torch.tensor([0.0, 0.5, 0.125, 0.1251, 2.0, 1.5, 1.875, 1.8749], dtype=torch.float64)
    got = experts(x, t, condition)
    for row, expert in enumerate([experts.high_noise, experts.low_noise] * 4):
        index = torch.tensor([row])
        alone = expert(x[index], t[index], select_rows(condition, index))
        torch.testing.assert_close(got[index], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("collective", "calls"), [(False, [0, 4]), (True, [1, 4])])
def test_sharded_experts_are_both_called_at_every_rank(
    experts: Experts, collective: bool, calls: list[int]
) -> None:
    rows: list[int] = []

    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(len(args[0]))

    x, _, condition = tiny_batch("wan")
    t = torch.full((4,), 0.6, dtype=torch.float64)
    expected = experts.low_noise(x, t, condition)
    experts.collective = collective
    for expert in (experts.high_noise, experts.low_noise):
        expert.register_forward_pre_hook(count)
    got = experts(x, t, condition)
    assert torch.equal(got, expected)
    assert rows == [n for n in calls if n]
    # Gradients are reduced in collective calls, too: zeros, where there is nothing to reduce.
    got.sum().backward()
    gradients = [parameter.grad for parameter in experts.high_noise.parameters()]
    assert all((g is not None and not g.any()) if collective else g is None for g in gradients)
    assert all(parameter.grad.any() for parameter in experts.low_noise.parameters())


def test_anchor_and_shortcut_are_one_experts_whatever_is_rounded() -> None:
    """Times a rounding apart, on both sides of the boundary, in float32."""
    experts = Experts(tiny("wan", seed=1), tiny("wan", seed=2), boundary=BOUNDARY).float()
    rows = 64
    x, _, condition = tiny_batch("wan", size=rows)
    x, text = x.float(), condition["text_embedding"].float()
    t = torch.tensor(0.125) + (torch.arange(rows) - rows // 2) * 2.0**-27
    assert len(t.unique()) > rows // 2
    arguments = ({"text_embedding": text}, None)
    anchor, value, _ = anchored_jvp(
        experts, (x, 2 - t, *arguments), (x, t), (x, torch.ones_like(t)), *arguments
    )
    experts_of = [
        {
            part is experts.high_noise
            for part in (experts.high_noise, experts.low_noise)
            if torch.allclose(part(x, time, arguments[0])[row], got[row], rtol=1e-3, atol=1e-3)
        }
        for row in range(0, rows, 8)
        for time, got in ((2 - t, anchor), (t, value))
    ]
    assert experts_of[::2] == experts_of[1::2]
    assert {True} in experts_of
    assert {False} in experts_of


def test_units_are_those_of_both(experts: Experts) -> None:
    high, low = experts.high_noise, experts.low_noise
    assert experts.blocks == [*high.network.blocks, *low.network.blocks]
    assert len(experts.time_embedders) == 2
    assert list(experts.shared_parts) == []
    condition: Condition = {"text_embedding": torch.zeros(2, 5, 12, dtype=torch.float64)}
    null: Tensor = experts.null_condition(condition)["text_embedding"]
    assert torch.equal(null[1], high.null_text_embedding)


def test_bad_input(experts: Experts) -> None:
    with pytest.raises(InvalidInputError, match=r"boundary = 875: not in \(0, 1\)"):
        Experts(experts.high_noise, experts.low_noise, boundary=875)
    x, t, condition = tiny_batch("wan")
    with pytest.raises(ValueError, match="r was given"):
        experts(x, t, condition, t)
