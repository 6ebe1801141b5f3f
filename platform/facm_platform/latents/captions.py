"""The texts of a latent set: a caption for each image, and embeddings for captions."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from facm_core.errors import require
from facm_core.text_encoders import TextEncoder
from facm_platform.latents.null_text import NullText
from facm_platform.latents.tables import TEXT_EMBEDDING, TEXT_MASK

_PLACEHOLDERS = ("class", "text")
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Texts instead of labels.

    Attributes:
        encoder: Folder or ``s3://`` address of a pipeline with ``text_encoder`` and ``tokenizer``;
            or ``words``, a fixed vector for each word, for trials.
        caption: Of an image: ``{class}`` stands for the name of its class, ``{text}`` for the text
            beside it.
        tokens: Length of an embedded caption; what is longer is cut off.
    """

    encoder: str
    caption: str = "{text}"
    tokens: int = 512

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "below 1", "Use e.g. 512")
        names = set(re.findall(r"\{([^{}]*)\}", self.caption))
        unknown = ", ".join(sorted(names.difference(_PLACEHOLDERS)))
        remedy = "Use {class} or {text}"
        require(not unknown, "caption", self.caption, f"nothing is called {unknown}", remedy)
        same = "it is the same for all images"
        require(bool(names), "caption", self.caption, same, remedy)

    def has(self, name: str) -> bool:
        """Whether captions have ``class`` or ``text`` in them."""
        return f"{{{name}}}" in self.caption

    def of(self, class_name: str, text: str) -> str:
        """The caption of an image; what it does not have in it may be anything."""
        values = {"class": class_name, "text": text}
        return re.sub(r"\{(class|text)\}", lambda name: values[name[1]], self.caption)


class Embedder:
    """Embeds prompts, equal ones once as long as they are remembered.

    Args:
        encoder: What embeds them.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        # Without padding, by prompt; the one that was asked for last comes last.
        self._kept: OrderedDict[str, NDArray[np.float16]] = OrderedDict()
        self._masks: dict[str, NDArray[np.uint8]] = {}
        self._bytes = 0

    @property
    def null(self) -> NullText:
        """What stands for no prompt."""
        return NullText.of(self._encoder)

    def columns(self, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Columns of B rows: ``text_embedding`` float16 (B, L, D), ``text_mask`` uint8 (B, L)."""
        tokens, features = self._encoder.text_shape
        embeddings = np.zeros((len(prompts), tokens, features), np.float16)
        masks = np.zeros((len(prompts), tokens), np.uint8)
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        for prompt, chosen in rows.items():
            if prompt in self._kept:
                self._kept.move_to_end(prompt)
            else:
                # Alone: an embedding rounds by what it is batched with, and a part that is made
                # again must have the same bytes.
                (embedding,), (mask_of_one,) = self._encoder.encode([prompt])
                self._keep(prompt, embedding[mask_of_one.bool()], mask_of_one)
            mask = self._masks[prompt]
            masks[chosen] = mask
            for row in chosen:
                embeddings[row, mask.astype(bool)] = self._kept[prompt]
        self._forget()
        return {TEXT_EMBEDDING: embeddings, TEXT_MASK: masks}

    def _keep(self, prompt: str, embedding: torch.Tensor, mask: torch.Tensor) -> None:
        self._kept[prompt] = embedding.cpu().numpy().astype(np.float16)
        self._masks[prompt] = mask.cpu().numpy().astype(np.uint8)
        self._bytes += self._kept[prompt].nbytes

    def _forget(self) -> None:
        while self._bytes > _KEPT_BYTES:
            prompt, embedding = self._kept.popitem(last=False)
            del self._masks[prompt]
            self._bytes -= embedding.nbytes
