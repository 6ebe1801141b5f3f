"""Wan (arXiv 2503.20314), conditioned on texts: the network of diffusers, or two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, cast

import torch

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_core.models.adapters import WanAdapter
from facm_core.models.experts import Experts
from facm_core.models.time_scale import slow_time

_CLASS = "WanTransformer3DModel"
_DATA = ("frames", "height", "width", "text_tokens", "boundary", "fastest")
"""Fields that diffusers' configuration of a network does not have."""


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Architecture of a Wan on latents and prompts of one shape, with diffusers' names.

    Attributes:
        frames: Frames of the latent; 1 for an image.
        height: Height of the latent.
        width: Width of the latent.
        in_channels: Channels of the latent.
        text_tokens: Rows of an embedded prompt, padding included.
        text_dim: Width of each of them.
        num_layers: Number of blocks.
        num_attention_heads: Attention heads.
        attention_head_dim: Channels of each, an even number from 6, for the 3-D rotation.
        ffn_dim: Width of a block's MLP.
        freq_dim: Width of the sinusoidal time features.
        patch_size: Of a patch, (frames, height, width); divides the latent's.
        cross_attn_norm: Whether tokens are normalised before they attend to the prompt.
        eps: Of all normalisations.
        rope_max_seq_len: Most patches along a side.
        boundary: Noise level at which two networks of this size take turns (`Experts`); None: one
            network for all times.
        fastest: Sinusoids of the time turn by at most so many radians per unit of t (`slow_time`);
            None: all of them are there, Wan's own.
    """

    frames: int = 1
    height: int
    width: int
    in_channels: int
    text_tokens: int
    text_dim: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    boundary: float | None = None
    fastest: float | None = None
    num_classes: ClassVar[int] = 0
    second_time: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                require(value >= 1, field.name, value, "below 1", "Use a whole number from 1")
        head = self.attention_head_dim
        require(
            head >= 6 and head % 2 == 0,
            "attention_head_dim",
            head,
            "not an even number from 6",
            "Use e.g. 128",
        )
        sides = (self.frames, self.height, self.width)
        require(
            len(self.patch_size) == 3
            and all(patch >= 1 for patch in self.patch_size)
            and all(side % patch == 0 for side, patch in zip(sides, self.patch_size, strict=True)),
            "patch_size",
            self.patch_size,
            f"does not divide frames, height and width = {sides}",
            "Use three divisors of them",
        )
        patches = max(side // patch for side, patch in zip(sides, self.patch_size, strict=True))
        require(
            patches <= self.rope_max_seq_len,
            "rope_max_seq_len",
            self.rope_max_seq_len,
            f"less than the {patches} patches along a side",
            "Use a smaller latent",
        )
        require(self.eps > 0, "eps", self.eps, "not positive", "Use e.g. 1e-6")
        require(
            self.boundary is None or 0 < self.boundary < 1,
            "boundary",
            self.boundary,
            "not in (0, 1)",
            "Use 0.875 for Wan 2.2, or none for one network",
        )
        require(
            self.fastest is None or self.fastest > 0,
            "fastest",
            self.fastest,
            "not positive",
            "Use e.g. 20, or none for Wan's own",
        )

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], **data: Any) -> WanConfig:
        """The architecture that the ``config.json`` of a diffusers network describes.

        Args:
            values: Its content.
            data: The fields that it does not have: shapes of the data, and the boundary.

        Raises:
            InvalidInputError: it is of another network than a Wan from text alone.
        """
        found = values.get("_class_name")
        require(found == _CLASS, "_class_name", found, f"not {_CLASS}", "Give the folder of a Wan")
        own = {field.name: field for field in fields(cls) if field.name not in _DATA}
        for name, field in own.items():
            known = name in values or field.default is not MISSING
            require(known, name, None, "missing", "Give the config.json that diffusers wrote")
        fixed = {"out_channels": values["in_channels"], "qk_norm": "rms_norm_across_heads"}
        for name, value in values.items():
            require(
                name.startswith("_") or name in own or value in (None, fixed.get(name)),
                name,
                value,
                f"not {fixed.get(name)}: it is no network from text alone",
                "Use a Wan for text to image or video",
            )
        taken = {name: values[name] for name in own if name in values}
        taken = {n: tuple(v) if isinstance(v, list) else v for n, v in taken.items()}
        return cls(**taken, **data)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image, (C, T, H, W) of a video."""
        sides = (self.frames, self.height, self.width)
        return (self.in_channels, *(sides[1:] if self.frames == 1 else sides))

    @property
    def text_shape(self) -> tuple[int, ...]:
        """Shape of an embedded prompt, (L, D)."""
        return (self.text_tokens, self.text_dim)

    @property
    def networks(self) -> int:
        """How many there are of this size."""
        return 1 if self.boundary is None else 2


# Wan 2.1 and 2.2; 2.2 in 14B is two experts with boundary=0.875.
WAN_PRESETS: dict[str, dict[str, Any]] = {
    "wan-1.3b": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16},
    "wan-5b": {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48},
    "wan-14b": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 16},
}


def wan_preset(name: str, *, height: int, width: int, **settings: Any) -> WanConfig:
    """A published size, on prompts as published.

    Args:
        name: A key of `WAN_PRESETS`.
        height: Height of the latent.
        width: Width of the latent.
        settings: Fields of `WanConfig` that differ.
    """
    require_one_of("preset", name, tuple(WAN_PRESETS))
    published = {"text_tokens": 512, "text_dim": 4096, "attention_head_dim": 128}
    return WanConfig(height=height, width=width, **published | WAN_PRESETS[name] | settings)


def build_wan(config: WanConfig) -> WanAdapter | Experts:
    """The velocity network, with a null prompt of zeros among its buffers.

    Raises:
        InvalidInputError: diffusers is not installed, or no sinusoid is as slow as `fastest`.
    """
    if config.boundary is None:
        return _network(config)
    return Experts(_network(config), _network(config), boundary=config.boundary)


def _network(config: WanConfig) -> WanAdapter:
    try:
        import diffusers
    except ImportError as error:
        raise InvalidInputError(
            "architecture",
            "wan",
            "its network is that of diffusers, which is not installed",
            "Install it: pip install diffusers",
        ) from error
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _DATA}
    network = cast(Any, diffusers).WanTransformer3DModel(**own, out_channels=config.in_channels)
    # Of its buffers no state dict holds, so that they must be numbers on the meta device, too.
    with torch.device("cpu"):
        network.rope = type(network.rope)(
            config.attention_head_dim, config.patch_size, config.rope_max_seq_len
        )
    null = {
        "text_embedding": torch.zeros(config.text_shape),
        "text_mask": torch.zeros(config.text_tokens),
    }
    adapter = WanAdapter(network, null=null)
    return adapter if config.fastest is None else slow_time(adapter, config.fastest)
