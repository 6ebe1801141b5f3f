"""DINOv2, whose features follow human judgement more closely (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize

from facm_core.errors import InvalidInputError, require
from facm_platform.evaluation.extractor import Extractor, Seen
from facm_platform.storage import absolute, file_sha256, node_copy

_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS = "model.safetensors"


class DinoV2(Extractor):
    """The class token after the last norm.

    Args:
        network: A `transformers.Dinov2Model`.
        uri: Of its folder.
        sha256: Of its weights.
    """

    resize = "bicubic-antialias-224"
    precision = "float32"

    def __init__(self, network: torch.nn.Module, uri: str, sha256: str) -> None:
        width = int(network.config.hidden_size)  # type: ignore[union-attr,arg-type]
        super().__init__(uri, sha256, name=f"dinov2-{width}", dimension=width)
        self._network = network.eval().requires_grad_(False)

    def to(self, device: torch.device, dtype: torch.dtype) -> DinoV2:
        """Moved and converted in place; returns self."""
        self._network.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Resized to 224 pixels."""
        parameter = next(self._network.parameters())
        pixels = images.to(parameter) / 255
        size = [_SIZE, _SIZE]
        pixels = resize(pixels, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
        tokens = self._network(pixel_values=normalize(pixels, _MEAN, _STD)).last_hidden_state
        return Seen(tokens[:, 0])


def load_dinov2(uri: str, field: str = "features_uri") -> DinoV2:
    """Read a model as Hugging Face publishes it: ``config.json`` and ``model.safetensors``.

    Args:
        uri: Its folder or ``s3://`` prefix.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: nothing there, or no such model.
    """
    # Takes seconds, which only those pay who use it.
    from transformers import Dinov2Config, Dinov2Model

    address = absolute(uri, field)
    try:
        with node_copy(address) as folder:
            sha256 = file_sha256(folder / _WEIGHTS)
            kind = Dinov2Config.get_config_dict(folder)[0].get("model_type")
            require(kind == "dinov2", field, uri, f"it is a {kind}", "Give a DINOv2")
            loaded: Any = Dinov2Model.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            network, report = loaded
    except (OSError, ValueError, RuntimeError) as error:
        remedy = "Give the folder of one, e.g. of dinov2-large, with its model.safetensors"
        problem = f"not a DINOv2: {Path(uri).name}: {error}"
        raise InvalidInputError(field, uri, problem, remedy) from error
    missing = sorted(report["missing_keys"])
    require(not missing, field, uri, f"its weights lack {missing}", "Give the whole file")
    return DinoV2(network, address, sha256)
