"""A tiny pipeline of Wan as diffusers would save it, and latents with texts for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from facm_core.autoencoders import Autoencoder, IdentityAutoencoder
from facm_core.models import WanConfig
from facm_core.text_encoders import text_encoder_sha256
from facm_platform.evaluation.features import Classifier, FeaturesInfo, save_features
from facm_platform.latents import LatentManifest
from facm_platform.latents.manifest import part_name
from facm_platform.latents.null_text import NullText
from facm_platform.latents.tables import RowFormat
from facm_platform.latents.writer import write_part
from facm_platform.registry import ArtifactConfig, load_artifact, save_artifact
from tests.small import artifact_config

SHAPE, TEXT = (4, 4, 4), (5, 12)
SIDE = 8
"""Pixels of the side of an image whose latent has `SHAPE`."""
MEAN, STD = (0.1, -0.2, 0.3, 0.0), (0.5, 0.6, 0.4, 0.7)
FLOW_SHIFT = 3.0
"""Of the scheduler, in noise levels."""
WORDS = ["a handwritten digit", "one two three four"]


def write_texts(folder: Path, rows: int = 64, *, by: Autoencoder | None = None) -> LatentManifest:
    """Latents that are told by their prompts, as if made `by` an autoencoder; a null prompt."""
    by = by or IdentityAutoencoder()
    random = np.random.default_rng(0)
    text = random.normal(size=(rows, *TEXT)).astype(np.float16)
    latents = np.einsum("nld,dchw->nchw", text, random.normal(size=(TEXT[1], *SHAPE)))
    latents = latents / latents.std() * np.reshape(STD, (4, 1, 1)) + np.reshape(MEAN, (4, 1, 1))
    format = RowFormat(latent_shape=SHAPE, latent_dtype="float32", text_shape=TEXT)
    table = format.table(
        {
            "latent": latents,
            "text_embedding": text,
            "text_mask": np.arange(TEXT[0]) < random.integers(1, TEXT[0] + 1, (rows, 1)),
            "key": [f"prompt {row}" for row in range(rows)],
        }
    )
    manifest = LatentManifest.of(
        format,
        [write_part(str(folder), part_name(0), [table], format)],
        mean=MEAN,
        std=STD,
        autoencoder_id=by.id,
        autoencoder_sha256=by.sha256,
        encoding_sha256="0" * 64,
        created_by="test",
    )
    manifest.save(str(folder))
    generator = torch.Generator().manual_seed(3)
    null = torch.randn(TEXT, generator=generator)
    NullText(null, torch.tensor([1, 1, 0, 0, 0])).save(str(folder))
    return manifest


def write_text_encoder(folder: Path, prompts: Sequence[str], *, seed: int = 0) -> None:
    """A tiny random UMT5 with a tokenizer of the words of `prompts`, as in Wan's pipeline."""
    words = Tokenizer(WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = ["<pad>", "</s>", "<unk>"]
    words.train_from_iterator(prompts, WordLevelTrainer(special_tokens=special))
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    config = UMT5Config(
        vocab_size=words.get_vocab_size(),
        d_model=TEXT[1],
        d_kv=6,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    """A tiny random autoencoder in the architecture of Wan 2.1; of images of twice `SHAPE`."""
    config = {
        "base_dim": 4,
        "z_dim": SHAPE[0],
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "scale_factor_spatial": 2,
        "latents_mean": list(MEAN),
        "latents_std": list(STD),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLWan(**config | changes)


def wan(seed: int) -> WanTransformer3DModel:
    """Random, without a weight at its zero start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            text_dim=TEXT[1],
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=16,
        )
        nn.init.normal_(network.proj_out.weight, std=0.1)
        # Times matter, so that a student that is told others has something to learn.
        nn.init.normal_(network.condition_embedder.time_proj.weight, std=0.5)
    return network


def write_pipeline(folder: Path, *, boundary: float | None) -> list[WanTransformer3DModel]:
    """A whole pipeline; with a boundary, of two experts, which are given back."""
    networks = [wan(seed) for seed in ((1,) if boundary is None else (1, 2))]
    for name, network in zip(("transformer", "transformer_2"), networks, strict=False):
        # In several files, as large networks are.
        network.save_pretrained(folder / name, max_shard_size="60KB")
    wan_vae().save_pretrained(folder / "vae")
    write_text_encoder(folder, WORDS)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "UniPCMultistepScheduler", "flow_shift": FLOW_SHIFT}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": boundary,
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None]
        if boundary is None
        else ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return networks


def write_student(
    folder: Path, manifest: LatentManifest, pipeline: Path, *, seed: int = 5, **changes: Any
) -> ArtifactConfig:
    """A random Wan of the set of `manifest` that is asked by the text encoder of `pipeline`."""
    encoder_sha256 = text_encoder_sha256(pipeline / "text_encoder", pipeline / "tokenizer")
    network = wan(seed)
    architecture = WanConfig.from_diffusers(
        {**network.config, "_class_name": "WanTransformer3DModel"},
        height=SHAPE[1],
        width=SHAPE[2],
        text_tokens=TEXT[0],
    )
    values: dict[str, Any] = {
        "role": "student",
        "architecture": architecture,
        "objective": "facm",
        "text_encoder_id": str(pipeline),
        "text_encoder_sha256": encoder_sha256,
        "recommended_nfe": (2, 4),
    }
    config = artifact_config(manifest, **values | changes)
    weights = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    # Prompts of a random encoder are alike, those of a trained one are not.
    weights["network.condition_embedder.text_embedder.linear_1.weight"] *= 30
    generator = torch.Generator().manual_seed(3)
    weights["null_text_embedding"] = torch.randn(TEXT, generator=generator)
    weights["null_text_mask"] = torch.ones(TEXT[0])
    save_artifact(folder, weights, config)
    return config


@dataclass(frozen=True)
class TextWorld:
    """Folders of everything an evaluation by texts needs."""

    folder: Path
    manifest: LatentManifest

    def __getattr__(self, name: str) -> str:
        return str(self.folder / name)


def write_text_world(folder: Path, prompts: Sequence[str], rows: int = 64) -> TextWorld:
    """``set``, ``pipeline``, ``teacher``, ``student``, and ``features`` of other latents."""
    manifest = write_texts(folder / "set", rows)
    write_text_encoder(folder / "pipeline", prompts)
    teacher = {"role": "teacher", "objective": "flow_matching", "conditioning": "plain"}
    write_student(
        folder / "teacher", manifest, folder / "pipeline", **teacher, guidance_scale=3.0, shift=0.5
    )
    sha256 = load_artifact(str(folder / "teacher")).sha256
    write_student(
        folder / "student", manifest, folder / "pipeline", seed=6, shift=0.5, teacher_sha256=sha256
    )
    info = FeaturesInfo(
        name="tiny",
        channels=SHAPE[0],
        size=SHAPE[1],
        num_classes=3,
        dimension=8,
        test_accuracy=0.0,
        latent_manifest_sha256="0" * 64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        save_features(str(folder / "features"), Classifier(info), info)
    return TextWorld(folder, manifest)


def rewrite(file: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Other tensors in a file; None takes one away."""
    tensors = {**load_file(file), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)
