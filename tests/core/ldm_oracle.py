"""Latent diffusion's KL autoencoder in plain PyTorch: its names, its shapes, what it computes.

Written from the layout alone, as functions of a state dict in it, and sharing nothing with the
code under test: the oracle of the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """As in latent diffusion's ``ddconfig``; `attention` holds levels instead of resolutions."""

    ch: int
    ch_mult: tuple[int, ...]
    attention: tuple[int, ...]
    z: int
    blocks: int = 2


VA_VAE = Sizes(ch=128, ch_mult=(1, 1, 2, 2, 4), attention=(4,), z=32)
TINY_VA_VAE = Sizes(ch=32, ch_mult=(1, 1, 2, 2, 4), attention=(4,), z=8)
TINY_SD = Sizes(ch=32, ch_mult=(1, 2, 4, 4), attention=(), z=4)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of every weight and bias."""
    return dict(_encoder(sizes)) | dict(_decoder(sizes))


def random_weights(sizes: Sizes, seed: int = 0) -> Weights:
    """Every value at random, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(sizes).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = 0.2 * noise + ("norm" in name and name.endswith("weight"))
    return weights


def encode(weights: Weights, images: Tensor) -> Tensor:
    """Mean and log-variance (B, 2z, h, w), as the last convolution leaves them."""
    x = _conv(weights, "encoder.conv_in", images)
    for level in range(_count(weights, "encoder.down.{}.")):
        x = _blocks(weights, f"encoder.down.{level}", x)
        if f"encoder.down.{level}.downsample.conv.weight" in weights:
            padded = F.pad(x, (0, 1, 0, 1))
            x = _conv(weights, f"encoder.down.{level}.downsample.conv", padded, stride=2, padding=0)
    x = _middle(weights, "encoder.mid", x)
    x = _conv(weights, "encoder.conv_out", F.silu(_norm(weights, "encoder.norm_out", x)))
    return _conv(weights, "quant_conv", x, padding=0)


def decode(weights: Weights, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W), not clipped."""
    x = _conv(weights, "post_quant_conv", latents, padding=0)
    x = _middle(weights, "decoder.mid", _conv(weights, "decoder.conv_in", x))
    for level in reversed(range(_count(weights, "decoder.up.{}."))):
        x = _blocks(weights, f"decoder.up.{level}", x)
        if f"decoder.up.{level}.upsample.conv.weight" in weights:
            doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = _conv(weights, f"decoder.up.{level}.upsample.conv", doubled)
    return _conv(weights, "decoder.conv_out", F.silu(_norm(weights, "decoder.norm_out", x)))


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _encoder(sizes: Sizes) -> Shapes:
    widths = [sizes.ch * multiple for multiple in sizes.ch_mult]
    yield from _of_conv("encoder.conv_in", 3, sizes.ch)
    before = sizes.ch
    for level, width in enumerate(widths):
        for block in range(sizes.blocks):
            yield from _of_block(f"encoder.down.{level}.block.{block}", before, width)
            if level in sizes.attention:
                yield from _of_attention(f"encoder.down.{level}.attn.{block}", width)
            before = width
        if level < len(widths) - 1:
            yield from _of_conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from _of_middle("encoder.mid", before)
    yield from _of_norm("encoder.norm_out", before)
    yield from _of_conv("encoder.conv_out", before, 2 * sizes.z)
    yield from _of_conv("quant_conv", 2 * sizes.z, 2 * sizes.z, kernel=1)


def _decoder(sizes: Sizes) -> Shapes:
    widths = [sizes.ch * multiple for multiple in sizes.ch_mult]
    yield from _of_conv("post_quant_conv", sizes.z, sizes.z, kernel=1)
    before = widths[-1]
    yield from _of_conv("decoder.conv_in", sizes.z, before)
    yield from _of_middle("decoder.mid", before)
    for level in reversed(range(len(widths))):
        for block in range(sizes.blocks + 1):
            yield from _of_block(f"decoder.up.{level}.block.{block}", before, widths[level])
            if level in sizes.attention:
                yield from _of_attention(f"decoder.up.{level}.attn.{block}", widths[level])
            before = widths[level]
        if level > 0:
            yield from _of_conv(f"decoder.up.{level}.upsample.conv", before, before)
    yield from _of_norm("decoder.norm_out", before)
    yield from _of_conv("decoder.conv_out", before, 3)


def _of_conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    yield f"{name}.bias", (outputs,)


def _of_norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _of_block(name: str, inputs: int, outputs: int) -> Shapes:
    yield from _of_norm(f"{name}.norm1", inputs)
    yield from _of_conv(f"{name}.conv1", inputs, outputs)
    yield from _of_norm(f"{name}.norm2", outputs)
    yield from _of_conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _of_conv(f"{name}.nin_shortcut", inputs, outputs, kernel=1)


def _of_attention(name: str, width: int) -> Shapes:
    yield from _of_norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _of_conv(f"{name}.{part}", width, width, kernel=1)


def _of_middle(name: str, width: int) -> Shapes:
    yield from _of_block(f"{name}.block_1", width, width)
    yield from _of_attention(f"{name}.attn_1", width)
    yield from _of_block(f"{name}.block_2", width, width)


def _count(weights: Weights, prefix: str) -> int:
    count = 0
    while any(name.startswith(prefix.format(count)) for name in weights):
        count += 1
    return count


def _conv(weights: Weights, name: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding)


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Group normalisation over 32 groups of channels."""
    groups = x.reshape(x.shape[0], 32, -1)
    variance, mean = torch.var_mean(groups, dim=2, keepdim=True, correction=0)
    normal = ((groups - mean) / torch.sqrt(variance + 1e-6)).reshape(x.shape)
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return normal * scale[:, None, None] + shift[:, None, None]


def _block(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = _conv(weights, f"{name}.conv1", F.silu(_norm(weights, f"{name}.norm1", x)))
    h = _conv(weights, f"{name}.conv2", F.silu(_norm(weights, f"{name}.norm2", h)))
    if f"{name}.nin_shortcut.weight" in weights:
        x = _conv(weights, f"{name}.nin_shortcut", x, padding=0)
    return x + h


def _attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One head over all positions."""
    normal = _norm(weights, f"{name}.norm", x)
    q, k, v = (_conv(weights, f"{name}.{part}", normal, padding=0).flatten(2) for part in "qkv")
    attended = torch.softmax(q.mT @ k / math.sqrt(x.shape[1]), dim=-1)  # (B, query, key)
    mixed = (v @ attended.mT).reshape(x.shape)
    return x + _conv(weights, f"{name}.proj_out", mixed, padding=0)


def _blocks(weights: Weights, level: str, x: Tensor) -> Tensor:
    for block in range(_count(weights, f"{level}.block.{{}}.")):
        x = _block(weights, f"{level}.block.{block}", x)
        if f"{level}.attn.{block}.q.weight" in weights:
            x = _attention(weights, f"{level}.attn.{block}", x)
    return x


def _middle(weights: Weights, name: str, x: Tensor) -> Tensor:
    x = _block(weights, f"{name}.block_1", x)
    return _block(weights, f"{name}.block_2", _attention(weights, f"{name}.attn_1", x))
