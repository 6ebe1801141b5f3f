"""Adapters of diffusers networks: direct calls, diffusers' own scheduler, whole-model JVPs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_core.jvp import chain_jvp
from facm_core.models.adapters import DiffusersAdapter, adapt
from facm_core.models.base import Condition
from facm_core.objectives import FACM, FACMConfig
from facm_core.samplers import sample_euler
from tests.core.tiny import NETWORKS, tiny, tiny_batch

every_network = pytest.mark.parametrize("name", NETWORKS)
text_networks = pytest.mark.parametrize("name", ["sd3", "wan"])
both_modes = pytest.mark.parametrize("recompute", [False, True], ids=["recorded", "recomputed"])
both_states = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])

# A constant added to every key changes no softmax; the last SD3 block gives no text.
WITHOUT_GRADIENT = {
    "dit": ["attn1.to_k.bias"],
    "sd3": ["transformer_blocks.2.attn.add_q_proj", "transformer_blocks.2.attn.norm_added_q"],
    "wan": [],
}


def output(name: str, network: nn.Module, x: Tensor, timestep: Tensor, given: Any) -> Tensor:
    """The network's own call and its own convention."""
    if name == "dit":
        return network(x, timestep=timestep, class_labels=given).sample
    text = given["text_embedding"]
    if name == "sd3":
        pooled = given["pooled_embedding"]
        return network(
            x, timestep=timestep, encoder_hidden_states=text, pooled_projections=pooled
        ).sample
    return network(x[:, :, None], timestep=timestep, encoder_hidden_states=text).sample[:, :, 0]


@every_network
@both_states
def test_velocity_is_the_converted_output(name: str, training: bool) -> None:
    model, (x, t, condition) = tiny(name, seed=1).train(training), tiny_batch(name)
    expected = output(name, model.network, x, (1 - t) * 1000, condition)
    expected = expected[:, :3] if name == "dit" else -expected
    v = model(x, t, condition)
    assert v.shape == x.shape
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12)


@text_networks
def test_euler_steps_equal_those_of_diffusers(name: str) -> None:
    """Sign of the velocity, direction of time and scale of the timestep, all at once."""
    model, (x, _, condition) = tiny(name, seed=1).float(), tiny_batch(name)
    noise, condition = x.float(), {n: v.float() for n, v in condition.items()}
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            predicted = output(name, model.network, expected, timestep.expand(4), condition)
            (expected,) = scheduler.step(predicted, timestep, expected, return_dict=False)
    got = sample_euler(model, noise, condition, steps=4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_network
def test_the_second_half_of_the_interval_is_another_domain(name: str) -> None:
    model, (x, t, condition) = tiny(name, seed=1), tiny_batch(name)
    assert relative_error(model(x, 2 - t, condition), model(x, t, condition)) > 0.1


@every_network
def test_float32_inputs_of_a_bfloat16_network(name: str) -> None:
    model, (x, t, condition) = tiny(name, seed=1).float(), tiny_batch(name)
    # Rounded to bfloat16, their timesteps would be off by up to 2, half a period of the sines.
    t = torch.tensor([0.1017, 0.3978, 0.4141, 1.7499])
    if isinstance(condition, dict):
        condition = {n: v.float() for n, v in condition.items()}
    expected = model(x.float(), t, condition)
    v = model.bfloat16()(x.float(), t, condition)
    assert v.dtype == torch.float32
    assert relative_error(v, expected) < 0.05


@every_network
def test_bfloat16_times_are_not_rounded_further(name: str) -> None:
    model, (x, _, condition) = tiny(name, seed=1), tiny_batch(name)
    t = torch.tensor([0.25, 0.5, 0.625, 1.75])  # exact in bfloat16; 1000·(1 − t) is not
    assert torch.equal(model(x, t.bfloat16(), condition), model(x, t, condition))


def test_a_rounded_timestep_is_refused() -> None:
    """As FSDP hands it to a block under the policy that casts a block's inputs."""
    model, (x, t, labels) = tiny("dit", seed=1).bfloat16(), tiny_batch("dit")
    with pytest.raises(InvalidInputError, match=r"timestep.dtype = torch.bfloat16: .* Shard the"):
        model.network(x.bfloat16(), t.bfloat16(), labels)


# --- Chain-JVP ----------------------------------------------------------------------------------


def directions(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    dx = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return dx.to(x), torch.tensor([1.0, -0.5, 0.3, 2.0]).to(t)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().norm() / expected.detach().norm())


def whole_model_jvp(
    model: DiffusersAdapter, x: Tensor, t: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(lambda x, t: model(x, t, condition), (x, t), directions(x, t))


def loss_of(value: Tensor, tangent: Tensor) -> Tensor:
    """Uses the tangent as a constant, as FACM does; mean squares keep both terms alike."""
    tangent = tangent.detach()
    return value.square().mean() + (value * tangent).mean() / tangent.square().mean().sqrt()


@every_network
@both_states
@both_modes
@pytest.mark.usefixtures("float64")
def test_chain_jvp_equals_the_whole_model(
    name: str, training: bool, recompute: bool, assert_same: Any
) -> None:
    model, (x, t, condition) = tiny(name, seed=1).train(training), tiny_batch(name)
    value, tangent = chain_jvp(model, (x, t), directions(x, t), condition, recompute=recompute)
    expected = whole_model_jvp(model, x, t, condition)
    assert value.dtype == tangent.dtype == torch.float64
    assert relative_error(value, expected[0]) < 1e-10
    assert relative_error(tangent, expected[1]) < 1e-10
    got = gradients(model, loss_of(value, tangent))
    want = gradients(model, loss_of(*expected))
    for dead in WITHOUT_GRADIENT[name]:
        found = [n for n in want if dead in n]
        assert found
        assert all(got.pop(n).norm() < 1e-12 and want.pop(n).norm() < 1e-12 for n in found)
    assert_same(got, want, 1e-10)


@every_network
@both_modes
@pytest.mark.usefixtures("float64")
def test_chain_jvp_equals_finite_differences(name: str, recompute: bool) -> None:
    model, (x, t, condition), h = tiny(name, seed=1), tiny_batch(name), 1e-7
    dx, dt = directions(x, t)
    with torch.no_grad():
        ahead, behind = (model(x + s * dx, t + s * dt, condition) for s in (h, -h))
        _, tangent = chain_jvp(model, (x, t), (dx, dt), condition, recompute=recompute)
        _, along_x = chain_jvp(model, (x, t), (dx, 0 * dt), condition, recompute=recompute)
    assert relative_error(tangent, (ahead - behind) / (2 * h)) < 1e-6
    assert relative_error(along_x, tangent) > 0.1  # the time reaches the output


@every_network
@both_modes
def test_chain_jvp_in_float32(name: str, recompute: bool) -> None:
    """With the casts of the network's own code."""
    model, (x, t, condition) = tiny(name, seed=1).float(), tiny_batch(name)
    x, t = x.float(), t.float()
    value, tangent = chain_jvp(model, (x, t), directions(x, t), condition, recompute=recompute)
    expected = whole_model_jvp(model, x, t, condition)
    assert value.dtype == tangent.dtype == torch.float32
    assert relative_error(value, expected[0]) < 1e-5
    assert relative_error(tangent, expected[1]) < 1e-4


# --- FACM ---------------------------------------------------------------------------------------


@every_network
@both_modes
def test_facm_reaches_every_parameter(name: str, recompute: bool) -> None:
    model, (x_1, t, condition) = tiny(name, seed=1), tiny_batch(name)
    objective = FACM(FACMConfig(label_dropout=0.5), recompute=recompute)
    draws = {"x_0": x_1.flip(0), "t": t / 2, "dropped": torch.tensor([True, False, False, True])}
    result = objective(model, x_1, condition, **draws)
    assert result.loss.isfinite()
    for parameter, gradient in gradients(model, result.loss).items():
        dead = any(part in parameter for part in WITHOUT_GRADIENT[name])
        assert (gradient.norm() < 1e-10) if dead else (gradient.norm() > 1e-6), parameter


@pytest.mark.usefixtures("float64")
def test_facm_equals_the_paper(make_batch: Any, facm_oracle: Any, assert_same: Any) -> None:
    student, batch = tiny("dit", seed=1), make_batch()
    expected_loss, expected = facm_oracle(w=1.75)(student, None, batch)
    config = FACMConfig(guidance=GuidanceConfig(scale=1.75, low=0.125))
    result = FACM(config)(student, batch.pop("x_1"), batch.pop("condition"), **batch)
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-9)
    got = gradients(student, result.loss)
    alive = [n for n in expected if "to_k.bias" not in n]
    assert_same({n: got[n] for n in alive}, {n: expected[n] for n in alive}, 1e-9)


# --- conditions ---------------------------------------------------------------------------------


def test_the_networks_own_label_dropout_is_off() -> None:
    network, (x, t, labels) = NETWORKS["dit"]().double(), tiny_batch("dit")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    for block in network.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 1.0
    expected = network.eval()(x, timestep=(1 - t) * 1000, class_labels=labels).sample[:, :3]
    assert torch.equal(adapt(network).train()(x, t, labels), expected)


def test_null_label() -> None:
    model, (x, t, labels) = tiny("dit", seed=1), tiny_batch("dit")
    assert model.null_condition(labels).tolist() == [5, 5, 5, 5]
    assert torch.equal(model(x, t, {"label": labels}), model(x, t, labels))


@text_networks
def test_null_prompt(name: str) -> None:
    model, (x, t, condition) = tiny(name, seed=1), tiny_batch(name)
    null = model.null_condition(condition)
    assert {n: v.shape for n, v in null.items()} == {n: v.shape for n, v in condition.items()}
    for n, value in null.items():
        assert (value == model.state_dict()[f"null_{n}"]).all()
    assert relative_error(model(x, t, null), model(x, t, condition)) > 0.01


def test_padding_of_a_wan_prompt_is_zeroed() -> None:
    model, (x, t, condition) = tiny("wan", seed=1), tiny_batch("wan")
    mask = torch.tensor([3, 5, 1, 2])[:, None] > torch.arange(5)
    text = condition["text_embedding"].clone()
    expected = model(x, t, {"text_embedding": text.masked_fill(~mask[..., None], 0.0)})
    text[~mask] = 7.0
    assert torch.equal(model(x, t, {"text_embedding": text, "text_mask": mask}), expected)


def test_wan_takes_videos() -> None:
    model, (x, t, condition) = tiny("wan", seed=1), tiny_batch("wan")
    assert torch.equal(model(x[:, :, None], t, condition)[:, :, 0], model(x, t, condition))
    video = torch.stack([x, x.flip(0), x], dim=2)
    v = model(video, t, condition)
    timestep, text = (1 - t) * 1000, condition["text_embedding"]
    expected = -model.network(video, timestep=timestep, encoder_hidden_states=text).sample
    assert torch.equal(v, expected)


@every_network
def test_the_adapter_holds_the_network(name: str) -> None:
    model = tiny(name, seed=1)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {f"network.{n}" for n, _ in model.network.named_parameters()}
    assert len(model.blocks) == 3
    assert all(block in set(model.network.modules()) for block in model.blocks)
    assert not model.second_time


@every_network
def test_blocks_are_called_as_a_whole_but_for_their_shared_parts(name: str) -> None:
    """What FSDP builds on: outside of its block's call, a part's parameters are not there."""
    model, running, outside = tiny(name, seed=1), [], set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, _: running.append(block))
        for part in set(block.modules()) - {block}:
            part.register_forward_pre_hook(
                lambda part, _, block=block: outside.add(part) if block not in running else None
            )
        block.register_forward_hook(lambda block, *_: running.remove(block))
    model(*tiny_batch(name))
    assert outside == {part for shared in model.shared_parts for part in shared.modules()}


# --- errors -------------------------------------------------------------------------------------


def test_an_unknown_network_is_refused() -> None:
    known = "DiTTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel"
    with pytest.raises(InvalidInputError, match=rf"network = 'Linear': .* Use one of {known}"):
        adapt(nn.Linear(1, 1))


def test_a_derived_network_is_known() -> None:
    class Mine(WanTransformer3DModel):
        pass

    mine = Mine(**{**NETWORKS["wan"]().config, "out_channels": None})  # as many as come in
    assert type(adapt(mine)) is type(tiny("wan", seed=1))


@every_network
def test_a_second_time_is_refused(name: str) -> None:
    model, (x, t, condition) = tiny(name, seed=1), tiny_batch(name)
    with pytest.raises(ValueError, match="second_time = False, but r was given"):
        model(x, t, condition, t)
    with pytest.raises(InvalidInputError, match="second_time = False"):
        FACM(FACMConfig(conditioning="auxiliary")).check_student(model)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("dit", "label"),
        ("sd3", "text_embedding"),
        ("sd3", "pooled_embedding"),
        ("wan", "text_embedding"),
    ],
)
def test_a_missing_condition_is_named(name: str, missing: str) -> None:
    model, (x, t, condition) = tiny(name, seed=1), tiny_batch(name)
    given = {} if isinstance(condition, Tensor) else dict(condition)
    given.pop(missing, None)
    with pytest.raises(InvalidInputError, match=rf"condition.{missing} = None: missing; .* Use a"):
        model(x, t, given)


@text_networks
def test_labels_are_no_prompt(name: str) -> None:
    model, (x, t, _) = tiny(name, seed=1), tiny_batch(name)
    with pytest.raises(InvalidInputError, match=r"text_embedding .* the condition has \['label'\]"):
        model(x, t, torch.zeros(4))


@text_networks
def test_a_missing_null_prompt_is_named(name: str) -> None:
    model, (_, _, condition) = tiny(name, seed=1), tiny_batch(name)
    with pytest.raises(InvalidInputError, match=r"null = \[\]: .* Give the adapter one row"):
        adapt(model.network).null_condition(condition)
    with pytest.raises(InvalidInputError, match=r"the condition has .*'text_mask'"):
        model.null_condition({**condition, "text_mask": torch.ones(4, 5)})
    longer = {n: torch.cat([v, v], 1) for n, v in condition.items()}
    with pytest.raises(InvalidInputError, match=r"null\..* = \(.*: a row of the condition has"):
        model.null_condition(longer)


@pytest.mark.parametrize(
    "network",
    [
        lambda: DiTTransformer2DModel(2, 8, 3, 4, 1, sample_size=4),
        lambda: SD3Transformer2DModel(**{**NETWORKS["sd3"]().config, "out_channels": 3}),
        lambda: WanTransformer3DModel(**{**NETWORKS["wan"]().config, "in_channels": 9}),
    ],
    ids=NETWORKS,
)
def test_an_output_that_is_no_velocity_is_refused(network: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"network.out_channels = \d: "):
        adapt(network())
