"""Embedded prompts beside those of diffusers' own Wan pipeline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from facm_core.errors import InvalidInputError
from facm_core.text_encoders import UMT5TextEncoder, WordTextEncoder, load_text_encoder
from tests.tiny_wan import TEXT, write_text_encoder

PROMPTS = ["a handwritten seven", "", "two  &amp;amp; three\n", "a handwritten " * 19, "unknown: Ω"]

TOKENS = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text_encoder(tmp_path, [*PROMPTS[:1], "two & three", "unknown:"])
    return tmp_path


def load(folder: Path, tokens: int = TEXT[0]) -> UMT5TextEncoder:
    return load_text_encoder("tiny", folder / "text_encoder", folder / "tokenizer", tokens)


def test_prompts_are_embedded_as_in_the_pipeline_of_wan(folder: Path) -> None:
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        scheduler=None,
        transformer=None,
    )
    expected, _ = pipeline.encode_prompt(
        PROMPTS,
        do_classifier_free_guidance=False,
        max_sequence_length=TOKENS,
        device=torch.device("cpu"),
    )
    got = load(folder, TOKENS).encode(PROMPTS)
    assert got.text_embedding.shape == (len(PROMPTS), TOKENS, TEXT[1])
    torch.testing.assert_close(got.text_embedding, expected)
    assert torch.equal(got.text_mask, (expected != 0).any(-1).float())
    # The end of the text alone; every token of the fourth, which is too long.
    assert got.text_mask.sum(1).tolist()[1::2] == [1, TOKENS]
    assert len(got.text_embedding.unique(dim=0)) == len(PROMPTS)


def test_the_hash_is_that_of_tokenizer_and_weights(folder: Path) -> None:
    before = load(folder).sha256
    assert load(folder, tokens=3).sha256 == before
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["shared.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = load(folder).sha256
    found = {before, changed}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        words = folder / "tokenizer" / name
        words.write_text(words.read_text() + "\n")
        found.add(load(folder).sha256)
    assert len(found) == 4


def test_words_have_vectors_of_their_own() -> None:
    encoder = WordTextEncoder(4)
    got = encoder.encode(["seven", "a  seven", "", "one two three four five"])
    assert got.text_embedding.shape == (4, *encoder.text_shape) == (4, 4, 32)
    assert got.text_mask.sum(1).tolist() == [2, 3, 1, 4]
    assert torch.equal(got.text_embedding != 0, (got.text_mask[..., None] != 0).expand(-1, -1, 32))
    seven, end = got.text_embedding[0, :2]
    assert torch.equal(got.text_embedding[1, 1:3], torch.stack([seven, end]))
    assert torch.equal(got.text_embedding[2, 0], end)
    # NumPy's own stream of the hash of "seven".
    words = np.frombuffer(hashlib.sha256(b"seven").digest(), np.uint32)
    torch.testing.assert_close(
        seven, torch.tensor(np.random.default_rng(words).standard_normal(32)).float()
    )
    many = encoder.encode([str(number) for number in range(1000)]).text_embedding[:, 0]
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


def test_what_is_no_text_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"text_encoder\.tokens = 0: below 1"):
        load(folder, tokens=0)
    with pytest.raises(InvalidInputError, match=r"there is no tokenizer\.json"):
        load_text_encoder("tiny", folder / "text_encoder", folder / "text_encoder")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    left_out = tensors.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"no whole UMT5 encoder: .*block\.1.*q\.weight"):
        load(folder)
    tensors["encoder.block.1.layer.0.SelfAttention.q.weight"] = left_out[:3]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InvalidInputError, match="not readable"):
        load(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidInputError, match="not readable"):
        load(folder)
    config = folder / "text_encoder" / "config.json"
    whole = config.read_text()
    for text, problem in (("[]", "no d_model|is a None"), ("{", "is damaged")):
        config.write_text(text)
        with pytest.raises(InvalidInputError, match=problem):
            load(folder)
    config.write_text(whole)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t5"}))
    with pytest.raises(InvalidInputError, match="it is a t5, not a UMT5"):
        load(folder)
    weights.unlink()
    with pytest.raises(InvalidInputError, match=r"no config\.json and \.safetensors"):
        load(folder)
