"""Prompts -> embeddings, as the pipelines of Wan (arXiv 2503.20314) make them."""

from __future__ import annotations

import copy
import hashlib
import html
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from facm_core.errors import InvalidInputError, require

MODEL, TOKENIZER = "text_encoder", "tokenizer"
"""Subfolders of a pipeline that diffusers saved."""

_CONFIG = "config.json"
_REMEDY = f"Give the folder of a Wan pipeline, with {MODEL} and {TOKENIZER} in it"


class EmbeddedText(NamedTuple):
    """B embedded prompts: a condition, entry by entry.

    Attributes:
        text_embedding: Float32 (B, L, D), zero on padding.
        text_mask: Float32 (B, L), 1 on the prompt and 0 on padding.
    """

    text_embedding: Tensor
    text_mask: Tensor


class TextEncoder(Protocol):
    """A frozen map from prompts to embeddings.

    Attributes:
        id: The name it was loaded by.
        sha256: Hash of its files: tokenizer, configuration and weights.
        text_shape: (L, D) of an embedded prompt. What is longer than L tokens is cut off.
    """

    id: str
    sha256: str
    text_shape: tuple[int, int]

    def encode(self, prompts: Sequence[str]) -> EmbeddedText:
        """Embed B prompts, each as if alone but for rounding; the empty one is the null prompt."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """The same encoder on `device`, computing in `dtype`; this one stays as it is."""


class WordTextEncoder:
    """A fixed random vector for each word, for trials: it knows every word, and needs no files.

    Args:
        tokens: L; one row is for the end of the text.
    """

    id = "words"
    sha256 = hashlib.sha256(b"words").hexdigest()
    _FEATURES = 32

    def __init__(self, tokens: int) -> None:
        self.text_shape = (tokens, self._FEATURES)

    def encode(self, prompts: Sequence[str]) -> EmbeddedText:
        """Split at white space, cut or pad to L rows."""
        embedding = torch.zeros(len(prompts), *self.text_shape)
        mask = torch.zeros(len(prompts), self.text_shape[0])
        for row, prompt in enumerate(prompts):
            words = [*prompt.split(), ""][: self.text_shape[0]]
            embedding[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = 1
        return EmbeddedText(embedding, mask)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> WordTextEncoder:
        """Itself: it computes nothing."""
        return self

    def _vector(self, word: str) -> Tensor:
        """Standard normal, by the word alone."""
        seed = np.frombuffer(hashlib.sha256(word.encode()).digest(), np.uint32)
        values = np.random.default_rng(seed).standard_normal(self._FEATURES)
        return torch.from_numpy(values.astype(np.float32))


class UMT5TextEncoder:
    """UMT5 (arXiv 2304.09151) with its tokenizer.

    Args:
        id: Its name.
        sha256: Hash of its files.
        tokenizer: Of transformers.
        module: ``UMT5EncoderModel``.
        tokens: L.
    """

    def __init__(self, id: str, sha256: str, tokenizer: Any, module: Any, tokens: int) -> None:
        self.id, self.sha256 = id, sha256
        self.text_shape = (tokens, int(module.config.d_model))
        self._tokenizer = tokenizer
        self._module = module.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> EmbeddedText:
        """Clean, cut or pad to L tokens, embed; what is embedded of padding becomes zero."""
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_shape[0],
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = (
            tokens[name].to(self._module.device) for name in ("input_ids", "attention_mask")
        )
        embedding = self._module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return EmbeddedText(embedding * mask[..., None], mask.float())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> UMT5TextEncoder:
        """A copy on `device` with its weights in `dtype`, under the same `sha256`.

        Itself where nothing would change: the published one takes 23 GB.
        """
        if (self._module.device, self._module.dtype) == (torch.device(device), dtype):
            return self
        other = copy.copy(self)
        other._module = nn.Module.to(copy.deepcopy(self._module), device=device, dtype=dtype)
        return other


def clean_prompt(prompt: str) -> str:
    """What Wan's pipeline makes of a prompt before it is cut into tokens: mended characters, HTML
    entities resolved, single spaces."""
    try:
        import ftfy
    except ImportError as error:
        raise _missing("ftfy") from error
    plain = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", plain).strip()


def load_text_encoder(
    id: str, model: Path, tokenizer: Path, tokens: int = 512, field: str = "text_encoder"
) -> UMT5TextEncoder:
    """A text encoder, on the CPU and in float32.

    Args:
        id: Any name for it.
        model: Folder of its configuration and ``.safetensors``, `MODEL` of a pipeline.
        tokenizer: Folder of its tokenizer, `TOKENIZER` of a pipeline.
        tokens: Length of an embedded prompt; Wan's own is 512.
        field: The one at fault in an error.

    Raises:
        InvalidInputError: no such folders, another kind of encoder, weights that do not fill it,
            or transformers is not installed.
    """
    require(tokens >= 1, f"{field}.tokens", tokens, "below 1", "Use e.g. 512")
    sha256 = text_encoder_sha256(model, tokenizer, field)
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    text_features(model, field)
    # Nothing is fetched, no code of the folder is run, nothing is unpickled.
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    # Or it reports at length, to the terminal, what `found` says.
    logs = logging.getLogger("transformers")
    level = logs.level
    logs.setLevel(logging.ERROR)
    try:
        loaded: Any = transformers.UMT5EncoderModel.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **local
        )
        words = transformers.AutoTokenizer.from_pretrained(tokenizer, **local)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(field, str(model), f"not readable ({error})", _REMEDY) from error
    finally:
        logs.setLevel(level)
    module, found = loaded
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in found[kind]]
    problem = f"its weights are no whole UMT5 encoder: {', '.join(sorted(wrong))}"
    require(not wrong, field, str(model), problem, _REMEDY)
    return UMT5TextEncoder(id, sha256, words, module, tokens)


def text_features(model: Path, field: str = "text_encoder") -> int:
    """D of what a text encoder makes, which is not loaded; arguments: `load_text_encoder`.

    Raises:
        InvalidInputError: it is of another kind, or its configuration is damaged.
    """
    try:
        values = dict(json.loads((model / _CONFIG).read_text()))
    except (TypeError, ValueError) as error:
        problem = f"{_CONFIG} is damaged ({error})"
        raise InvalidInputError(field, str(model), problem, _REMEDY) from error
    kind, features = values.get("model_type"), values.get("d_model")
    require(kind == "umt5", field, str(model), f"it is a {kind}, not a UMT5", _REMEDY)
    if not isinstance(features, int):
        raise InvalidInputError(field, str(model), f"{_CONFIG} has no d_model", _REMEDY)
    return features


def text_encoder_sha256(model: Path, tokenizer: Path, field: str = "text_encoder") -> str:
    """Hash of the files of a text encoder, which is not loaded; arguments: `load_text_encoder`.

    Raises:
        InvalidInputError: there is none.
    """
    weights = sorted(model.glob("*.safetensors"))
    # Special tokens are told beside the words.
    words = sorted((*tokenizer.glob("*.json"), *tokenizer.glob("*.model")))
    has_words = any(file.name in ("tokenizer.json", "spiece.model") for file in words)
    for folder, is_there, what in (
        (model, (model / _CONFIG).is_file() and bool(weights), f"{_CONFIG} and .safetensors"),
        (tokenizer, has_words, "tokenizer.json or spiece.model"),
    ):
        require(is_there, field, str(folder), f"there is no {what} in it", _REMEDY)
    digest = hashlib.sha256()
    for file in (model / _CONFIG, *words, *weights):
        with file.open("rb") as content:
            of_file = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.name} {of_file}\n".encode())
    return digest.hexdigest()


def _missing(package: str) -> InvalidInputError:
    problem = "needed to embed prompts, and not installed"
    return InvalidInputError("package", package, problem, f"Install it: pip install {package}")
