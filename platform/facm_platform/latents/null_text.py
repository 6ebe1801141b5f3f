"""How the prompts of a latent set were embedded: ``null_text.safetensors`` beside its manifest.

The file holds the null prompt, and in its metadata the text encoder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from facm_core.errors import InvalidInputError, require
from facm_core.text_encoders import TextEncoder
from facm_platform import storage
from facm_platform.latents.manifest import LatentManifest
from facm_platform.latents.tables import TEXT_EMBEDDING, TEXT_MASK

NULL_TEXT = "null_text.safetensors"
_ENCODER = "text_encoder"
_REMEDY = "Embed the null prompt like those of the set, and write it by NullText.save"


@dataclass(frozen=True)
class NullText:
    """What stands for no prompt, embedded like the prompts of the set.

    Attributes:
        text_embedding: (L, D).
        text_mask: (L,), 1 on the prompt and 0 on padding.
        encoder_id: Address of the text encoder; empty where it is not known, so that a model of
            this set cannot be asked by prompt.
        encoder_sha256: Hash of its files.
    """

    text_embedding: Tensor
    text_mask: Tensor
    encoder_id: str = ""
    encoder_sha256: str = ""

    @staticmethod
    def of(encoder: TextEncoder) -> NullText:
        """The empty prompt, embedded."""
        (embedding,), (mask,) = encoder.encode([""])
        return NullText(embedding, mask, encoder.id, encoder.sha256)

    @staticmethod
    def load(uri: str, manifest: LatentManifest, field: str = "data.uri") -> NullText:
        """The null prompt of the set at `uri`.

        Raises:
            InvalidInputError: there is none, or it is none of this set. `field` is the one at
                fault.
        """
        file = storage.join(uri, NULL_TEXT)
        try:
            tensors, metadata = _read(storage.read_bytes(file))
        except FileNotFoundError:
            problem = f"the set has no null prompt: there is no {NULL_TEXT}"
            raise InvalidInputError(field, uri, problem, _REMEDY) from None
        except SafetensorError as error:
            raise InvalidInputError(field, file, f"not readable ({error})", _REMEDY) from None
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        tokens = manifest.text_shape[:1]
        expected = {TEXT_EMBEDDING: tuple(manifest.text_shape), TEXT_MASK: tokens}
        require(shapes == expected, field, file, f"it holds {shapes}, not {expected}", _REMEDY)
        null = NullText(tensors[TEXT_EMBEDDING].float(), tensors[TEXT_MASK].float(), **metadata)
        finite = bool(null.text_embedding.isfinite().all())
        require(finite, field, file, f"{TEXT_EMBEDDING} is not finite", _REMEDY)
        flags = bool(((null.text_mask == 0) | (null.text_mask == 1)).all())
        require(flags, field, file, f"{TEXT_MASK} holds more than 0 and 1", _REMEDY)
        return null

    def save(self, uri: str) -> None:
        """Write it beside the manifest of the set at `uri`."""
        storage.write_bytes(storage.join(uri, NULL_TEXT), self._content())

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Make it the null prompt of a network that reads texts, or of each of its experts."""
        for name, buffer in network.named_buffers():
            for entry in (TEXT_EMBEDDING, TEXT_MASK):
                if f".{name}".endswith(f".null_{entry}"):
                    buffer.copy_(getattr(self, entry))

    @property
    def sha256(self) -> str:
        """Hash of the file that `save` writes."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        tensors = {
            TEXT_EMBEDDING: self.text_embedding.float().contiguous(),
            TEXT_MASK: self.text_mask.to(torch.uint8),
        }
        encoder = {"encoder_id": self.encoder_id, "encoder_sha256": self.encoder_sha256}
        # One entry: safetensors writes several in an order of chance.
        metadata = {_ENCODER: json.dumps(encoder)} if self.encoder_id else None
        return safetensors.torch.save(tensors, metadata)


def _read(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and the text encoder in its metadata."""
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, json.loads(header.get("__metadata__", {}).get(_ENCODER, "{}"))
