"""Students in diffusers' own pipeline, saved and loaded: against the samplers of facm_core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from facm_core.diffusers_pipeline import FewStepScheduler, noise_seeds, save_pipeline
from facm_core.errors import InvalidInputError
from facm_core.models.experts import Experts
from facm_core.models.time_scale import slow_time
from facm_core.samplers import sample_consistency, sample_euler
from tests.core.tiny import tiny

PROMPTS = ["a red cat", "blue"]
LENGTH = 5
WORDS = ["<pad>", "<unk>", "a", "red", "cat", "blue"]
SHIFT = 3.0
BOUNDARY = 0.875
SAMPLERS = ["consistency", "euler", "anchor"]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Tiny autoencoder, text encoder and tokenizer, as the pipeline wants them."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(
            UMT5Config(vocab_size=8, d_model=12, d_kv=6, d_ff=24, num_layers=1, num_heads=2)
        ).eval(),
        "vae": AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ).eval(),
    }


def student_of(kind: str) -> Any:
    def one(seed: int) -> Any:
        model = tiny("wan", seed=seed).float()
        # Of the size of the noise, so that images do not saturate.
        model.network.proj_out.weight.data *= 0.2
        return slow_time(model) if kind.startswith("slow") else model

    return Experts(one(1), one(2), boundary=BOUNDARY) if kind.endswith("experts") else one(1)


def condition_of(prompts: list[str], parts: dict[str, Any]) -> dict[str, Tensor]:
    """Embeddings, zero after a prompt's end."""
    ids = torch.zeros(len(prompts), LENGTH, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        words = [WORDS.index(word) for word in prompt.split()]
        ids[row, : len(words)] = torch.tensor(words)
    mask = ids > 0
    with torch.no_grad():
        embedding = parts["text_encoder"](ids, mask).last_hidden_state
    return {"text_embedding": embedding * mask[..., None]}


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (B, T, C, H, W) in [0, 1]."""
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def ours(student: Any, sampler: str, noise: Tensor, condition: Any, steps: int) -> Tensor:
    settings = {"steps": steps, "shift": 1 / SHIFT}
    if sampler == "consistency":
        seeds = noise_seeds(noise)
        return sample_consistency(student, noise, condition, seeds=seeds, **settings)
    return sample_euler(student, noise, condition, expanded=sampler == "anchor", **settings)


def load(folder: Path, parts: dict[str, Any]) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: WanPipeline, prompts: list[str], steps: int, **given: Any) -> Tensor:
    return pipeline(
        prompts,
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=LENGTH,
        **{"num_frames": 1, "output_type": "pt"} | given,
    ).frames


@pytest.mark.parametrize("kind", ["one", "experts", "slow one", "slow experts"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_those_of_our_samplers(
    kind: str, sampler: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    """From the same generator, to 1e-5, in 1, 2, 4 and 8 steps; with Wan's shift of 3."""
    student, condition = student_of(kind), condition_of(PROMPTS, parts)
    save_pipeline(tmp_path, student, FewStepScheduler(sampler=sampler, shift=SHIFT))
    pipeline = load(tmp_path, parts)
    assert type(pipeline.scheduler) is FewStepScheduler
    for steps in (1, 2, 4, 8):
        noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(steps))
        expected = ours(student, sampler, noise, condition, steps)
        generator = torch.Generator().manual_seed(steps)
        latents = theirs(pipeline, PROMPTS, steps, generator=generator, output_type="latent")
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
        images = theirs(pipeline, PROMPTS, steps, generator=generator.manual_seed(steps))
        pictures = decode(parts["vae"], expected)
        torch.testing.assert_close(images, pictures, rtol=0, atol=1e-5)
        assert ((pictures > 0) & (pictures < 1)).float().mean() > 0.5
        assert (pictures[0] - pictures[1]).abs().max() > 0.01
    assert len(list(tmp_path.glob("transformer*/*.safetensors"))) == 1 + ("experts" in kind)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_expert_has_its_steps(sampler: str, parts: dict[str, Any], tmp_path: Path) -> None:
    """At σ = 1, 0.9, 0.75, 0.5 for a shift of 3; the boundary of 0.9 is the noisy expert's."""
    student = student_of("experts")
    student.boundary = 0.9
    save_pipeline(tmp_path, student, FewStepScheduler(sampler=sampler, shift=SHIFT))
    pipeline, calls = load(tmp_path, parts), []
    weights = {name: e.network.proj_out.weight for name, e in student.named_children()}

    def note(network: nn.Module, *_: Any) -> None:
        own = network.proj_out.weight
        calls.extend(name for name, weight in weights.items() if torch.equal(own, weight))

    for network in (pipeline.transformer, pipeline.transformer_2):
        network.register_forward_pre_hook(note)
    theirs(pipeline, ["blue"], 4)
    assert calls == ["high_noise"] * 2 + ["low_noise"] * 2


def test_videos(parts: dict[str, Any], tmp_path: Path) -> None:
    student, condition = student_of("one"), condition_of(PROMPTS, parts)
    save_pipeline(tmp_path, student, FewStepScheduler(shift=SHIFT))
    noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    video = theirs(load(tmp_path, parts), PROMPTS, 2, num_frames=5, latents=noise)
    assert video.shape == (2, 5, 3, 32, 32)
    expected = decode(parts["vae"], ours(student, "consistency", noise, condition, 2))
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


def test_an_image_depends_on_its_own_generator_only(parts: dict[str, Any], tmp_path: Path) -> None:
    save_pipeline(tmp_path, student_of("one"), FewStepScheduler())
    pipeline = load(tmp_path, parts)

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return theirs(pipeline, prompts, 4, generator=generators)

    together = draw([*PROMPTS, "blue"], [3, 4, 5])
    torch.manual_seed(9)
    alone = torch.cat([draw([p], [s]) for p, s in zip(PROMPTS, (3, 4), strict=True)])
    torch.testing.assert_close(together[:2], alone, rtol=0, atol=1e-5)
    assert (together[1] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize(("sampler", "sign"), [("consistency", 1), ("euler", 1), ("anchor", -1)])
def test_noise_levels_are_those_of_diffusers(sampler: str, sign: int) -> None:
    theirs, scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0), FewStepScheduler(sampler, 5.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas.float(), theirs.sigmas)
    torch.testing.assert_close(scheduler.timesteps, sign * theirs.timesteps)


def test_guided_euler_steps_are_those_of_diffusers(parts: dict[str, Any], tmp_path: Path) -> None:
    """The flow under the pipeline's own guidance, step for step as diffusers integrates it."""
    save_pipeline(tmp_path, student_of("experts"), FewStepScheduler("euler", SHIFT))
    pipeline = load(tmp_path, parts)
    given = {"guidance_scale": 3.0, "latents": torch.randn(1, 4, 1, 4, 4), "num_frames": 1}
    given |= {"height": 32, "width": 32, "max_sequence_length": LENGTH, "output_type": "latent"}
    (got,) = pipeline("cat", num_inference_steps=4, return_dict=False, **given)

    class Even(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps: int, device: Any) -> None:
            super().set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)

    pipeline.scheduler = Even(shift=SHIFT)
    (expected,) = pipeline("cat", num_inference_steps=4, return_dict=False, **given)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_slow_network_is_an_ordinary_one(parts: dict[str, Any], tmp_path: Path) -> None:
    student = student_of("slow one")
    # As if another network's weights had been loaded into it.
    nn.init.normal_(student.network.condition_embedder.time_embedder.linear_1.weight)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 1.6])
    condition = condition_of(PROMPTS, parts)
    expected = student(x, t, condition)
    save_pipeline(tmp_path, student, FewStepScheduler())
    network = load(tmp_path, parts).transformer
    assert type(network.condition_embedder.timesteps_proj).__name__ == "Timesteps"
    student.network = network
    assert torch.equal(student(x, t, condition), expected)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"sampler = 'heun': .* Use one of"):
        FewStepScheduler(sampler="heun")
    with pytest.raises(InvalidInputError, match="shift = 0: not positive"):
        FewStepScheduler(shift=0)
    with pytest.raises(InvalidInputError, match="steps = 0: below 1"):
        FewStepScheduler().set_timesteps(0)
    with pytest.raises(InvalidInputError, match=r"student = 'SD3Adapter': .* Use a WanAdapter"):
        save_pipeline(tmp_path, tiny("sd3", seed=1), FewStepScheduler())
    assert not list(tmp_path.iterdir())
