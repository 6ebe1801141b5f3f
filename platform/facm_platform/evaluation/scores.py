"""How well pictures fit their prompts, as published models see it; their weights are the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_platform import storage

CLIP, PICKSCORE = "clip", "pickscore"
NAMES = {CLIP: "CLIP", PICKSCORE: "PickScore"}
"""Kind -> how it is written on sheets."""

# All that tells what is made of a picture and of a prompt.
_FILES = (".json", ".model", ".safetensors", ".txt")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A score of a picture and its prompt.

    Attributes:
        kind: ``clip``: 100 · max(cos, 0) of the two embeddings (arXiv 2104.08718, whose factor is
            2.5); ``pickscore``: exp(logit_scale) · cos (arXiv 2305.01569).
        weights_uri: Folder or ``s3://`` prefix of a CLIP with its processor, as transformers saves
            them: ``clip-vit-large-patch14``, ``PickScore_v1``.
    """

    kind: str
    weights_uri: str

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, tuple(NAMES))


class PromptScorer:
    """A score, in float32, of each picture alone.

    Attributes:
        kind: See `ScoreConfig`.
        uri: Of its folder, absolute.
        sha256: Of its files: weights, configuration, tokenizer.
    """

    def __init__(self, kind: str, uri: str, sha256: str, module: Any, processor: Any) -> None:
        self.kind, self.uri, self.sha256 = kind, uri, sha256
        self._module = module.eval().requires_grad_(False)
        self._processor = processor

    def to(self, device: torch.device | str) -> PromptScorer:
        """Moved in place; returns self."""
        self._module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        """Of uint8 images (C, H, W), each with its prompt, which is cut off where CLIP ends."""
        return [self._score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _score(self, image: Tensor, prompt: str) -> float:
        rgb = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
        given = self._processor(
            text=[prompt],
            images=[Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy(), "RGB")],
            padding=True,
            truncation=True,
            max_length=self._module.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        seen = self._module(**given.to(self._module.device))
        # Both have the length 1.
        cosine = (seen.image_embeds[0] * seen.text_embeds[0]).sum()
        if self.kind == CLIP:
            return 100 * max(float(cosine), 0.0)
        return float(self._module.logit_scale.exp() * cosine)


def load_scorer(config: ScoreConfig, field: str = "scores") -> PromptScorer:
    """Read a CLIP with its processor.

    Args:
        config: Which.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: nothing there, or no such model.
    """
    # Takes seconds, which only those pay who use it.
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    uri, name = config.weights_uri, f"{field}.weights_uri"
    address = storage.absolute(uri, name)
    remedy = "Give the folder of one, with its processor and its weights as .safetensors"
    # Nothing is fetched, no code of the folder is run, nothing is unpickled.
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        with storage.node_copy(address) as folder:
            kind = CLIPConfig.get_config_dict(folder)[0].get("model_type")
            require(kind == "clip", name, uri, f"it is a {kind}, not a CLIP", remedy)
            loaded: Any = CLIPModel.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **local,
            )
            processor = CLIPProcessor.from_pretrained(folder, **local)
            sha256 = _sha256(folder)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InvalidInputError):
            raise
        problem = f"not a CLIP: {Path(uri).name}: {error}"
        raise InvalidInputError(name, uri, problem, remedy) from error
    module, report = loaded
    missing = sorted(map(str, report["missing_keys"]))
    require(not missing, name, uri, f"its weights lack {missing}", "Give the whole file")
    return PromptScorer(config.kind, address, sha256, module, processor)


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _FILES:
            digest.update(f"{file.name} {storage.file_sha256(file)}\n".encode())
    return digest.hexdigest()
