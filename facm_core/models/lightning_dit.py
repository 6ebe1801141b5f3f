"""LightningDiT (arXiv 2501.01423): a DiT with RMSNorm, QK-norm, 2-D RoPE and SwiGLU.

Parameter and buffer names equal those of the published LightningDiT and FACM code, so that
published weights load key by key; the numerics equal it too (a test holds both). Shape legend:
B batch, N tokens, D hidden size, C latent channels, H heads, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facm_core.errors import require, require_one_of
from facm_core.models.base import Condition, entry, null_labels

FREQUENCIES = 256  # width of the sinusoidal time features, before the MLP


@dataclass(frozen=True, kw_only=True)
class LightningDiTConfig:
    """Architecture of a LightningDiT.

    Attributes:
        input_size: Height and width of the latent.
        in_channels: Channels of the latent.
        patch_size: Side of a patch; divides `input_size`.
        hidden_size: Token width; a multiple of 4 · `num_heads`, for the 2-D rotation.
        depth: Number of blocks.
        num_heads: Attention heads.
        num_classes: Labels are 0 … num_classes − 1; num_classes itself is the null label.
        mlp_ratio: The SwiGLU width is ⌊⅔ · mlp_ratio · hidden_size⌋.
        second_time: Whether there is a second time embedding r (FACM's auxiliary conditioning).
    """

    input_size: int
    in_channels: int
    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    second_time: bool = False
    text_shape: ClassVar[tuple[int, ...]] = ()
    networks: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("input_size", "in_channels", "patch_size", "hidden_size", "depth"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.num_heads >= 1, "num_heads", self.num_heads, "below 1", "Use at least 1")
        require(self.num_classes >= 1, "num_classes", self.num_classes, "below 1", "Use at least 1")
        require(self.mlp_ratio > 0, "mlp_ratio", self.mlp_ratio, "not positive", "Use e.g. 4.0")
        require(
            self.input_size % self.patch_size == 0,
            "patch_size",
            self.patch_size,
            f"does not divide input_size = {self.input_size}",
            "Use a divisor of input_size",
        )
        require(
            self.hidden_size % (4 * self.num_heads) == 0,
            "hidden_size",
            self.hidden_size,
            f"not a multiple of 4 · num_heads = {4 * self.num_heads}",
            "Change hidden_size or num_heads",
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return (self.in_channels, self.input_size, self.input_size)


PRESETS: dict[str, dict[str, Any]] = {
    "B/1": {"depth": 12, "hidden_size": 768, "patch_size": 1, "num_heads": 12},
    "B/2": {"depth": 12, "hidden_size": 768, "patch_size": 2, "num_heads": 12},
    "L/2": {"depth": 24, "hidden_size": 1024, "patch_size": 2, "num_heads": 16},
    "XL/1": {"depth": 28, "hidden_size": 1152, "patch_size": 1, "num_heads": 16},
    "XL/2": {"depth": 28, "hidden_size": 1152, "patch_size": 2, "num_heads": 16},
    "1p0B/1": {"depth": 24, "hidden_size": 1536, "patch_size": 1, "num_heads": 24},
    "1p0B/2": {"depth": 24, "hidden_size": 1536, "patch_size": 2, "num_heads": 24},
    "1p6B/1": {"depth": 28, "hidden_size": 1792, "patch_size": 1, "num_heads": 28},
    "1p6B/2": {"depth": 28, "hidden_size": 1792, "patch_size": 2, "num_heads": 28},
}


def preset_config(name: str, **settings: Any) -> LightningDiTConfig:
    """See `LightningDiT.preset`.

    Raises:
        InvalidInputError: an unknown preset or field.
    """
    require_one_of("preset", name, tuple(PRESETS))
    values = {"input_size": 16, "in_channels": 32, "num_classes": 1000} | PRESETS[name] | settings
    known = tuple(field.name for field in fields(LightningDiTConfig))
    for field_name in settings:
        require_one_of("architecture", field_name, known)
    return LightningDiTConfig(**values)


class LightningDiT(nn.Module):
    """Class-conditional velocity network.

    Call: ``model(x, t, condition, r=None)`` with x (B, C, S, S), t (B,) in [0, 2], labels
    condition (B,) int64, and r (B,) where ``config.second_time``; returns a velocity like x.
    """

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        self.config = config
        d, grid = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbedding(config)
        self.t_embedder = TimeEmbedding(d)
        self.r_embedder = TimeEmbedding(d) if config.second_time else None
        self.y_embedder = LabelEmbedding(config.num_classes, d)
        # Stored, like the published code does, though it never changes.
        self.pos_embed = nn.Parameter(sincos_2d(d, grid)[None], requires_grad=False)
        self.feat_rope = Rope2D(d // config.num_heads, grid)
        self.blocks = nn.ModuleList(
            Block(d, config.num_heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(d, config.patch_size**2 * config.in_channels)
        self.initialise()

    @classmethod
    def preset(cls, name: str, **settings: Any) -> LightningDiT:
        """A published size (``"XL/1"`` …) on the published latent, 32×16×16 and 1,000 classes.

        Args:
            name: A key of `PRESETS`.
            settings: Fields of `LightningDiTConfig` that differ.
        """
        return cls(preset_config(name, **settings))

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The embedding of t, and that of r where there is one."""
        return [part for part in (self.t_embedder, self.r_embedder) if part is not None]

    @property
    def shared_parts(self) -> tuple[nn.Module, ...]:
        """None."""
        return ()

    @property
    def second_time(self) -> bool:
        """Whether the network reads r."""
        return self.config.second_time

    def null_condition(self, condition: Condition) -> Condition:
        """The null label in every row."""
        return null_labels(condition, self.config.num_classes)

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None
    ) -> Tensor:
        """Velocity (B, C, S, S) at x and t.

        Raises:
            ValueError: r missing on a network with a second time, or given to one without.
        """
        if (r is None) == (self.r_embedder is not None):
            raise ValueError(
                f"second_time = {self.second_time}, but r was {'not ' if r is None else ''}given"
            )
        h = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(entry(condition, "label"))
        if self.r_embedder is not None:
            c = c + self.r_embedder(r)
        for block in self.blocks:
            h = block(h, c, self.feat_rope)
        return self.unpatchify(self.final_layer(h, c))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, N, P·P·C) -> (B, C, S, S)."""
        p, c = self.config.patch_size, self.config.in_channels
        grid = self.config.input_size // p
        x = patches.view(-1, grid, grid, p, p, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, grid * p, grid * p)

    def initialise(self) -> None:
        """DiT's initialisation: adaLN and the output start at zero, so F = 0 at first."""
        for linear in _linears(self):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in self.time_embedders:
            for linear in _linears(embedder):
                nn.init.normal_(linear.weight, std=0.02)
        zeroed = [*_linears(self.final_layer)]
        for block in self.blocks:
            zeroed += _linears(cast(Block, block).adaLN_modulation)
        if self.r_embedder is not None:
            # r adds nothing at first, so that a model without it can be continued with it.
            zeroed.append(_linears(self.r_embedder)[-1])
        for linear in zeroed:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, linearly embedded: (B, C, S, S) -> (B, N, D)."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of a time (B,), then an MLP -> (B, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        # A rounded time is another time.
        with torch.autocast(t.device.type, enabled=False):
            features = time_features(t, FREQUENCIES)
            return self.mlp(features.to(_linears(self.mlp)[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Table of class embeddings; its last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight (arXiv 1910.07467), computed in float32 or better."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight


class Rope2D(nn.Module):
    """Rotary position embedding over a square grid (EVA-02, arXiv 2303.11331).

    The first half of a head's channels rotates with the row, the second with the column.
    """

    def __init__(self, head_size: int, grid: int, theta: float = 10_000.0) -> None:
        super().__init__()
        half = head_size // 2
        frequencies = theta ** -(torch.arange(0, half, 2).float() / half)
        angles = torch.arange(grid).float()[:, None] * frequencies.repeat_interleave(2)
        rows = angles[:, None].expand(grid, grid, half)
        columns = angles[None, :].expand(grid, grid, half)
        table = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        self.register_buffer("freqs_cos", table.cos())
        self.register_buffer("freqs_sin", table.sin())
        self.freqs_cos: Tensor
        self.freqs_sin: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Rotate queries or keys x (B, H, N, K)."""
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: Rope2D) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = rope(self.q_norm(q)), rope(self.k_norm(k))
        heads = F.scaled_dot_product_attention(q, k, v)
        return self.proj(heads.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """w3(silu(x₁)·x₂) with x₁, x₂ = w12(x) (arXiv 2002.05202)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(size, 2 * width)
        self.w3 = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        x_1, x_2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x_1) * x_2)


class Block(nn.Module):
    """Attention and SwiGLU, each modulated and gated by the conditioning (adaLN-zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.norm2 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * int(hidden_size * mlp_ratio)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, rope: Rope2D) -> Tensor:
        """Tokens x (B, N, D), conditioning c (B, D) -> (B, N, D)."""
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rope)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def at_least_float32(x: Tensor) -> Tensor:
    """x itself in float32 or float64, else a float32 copy."""
    return x if x.dtype == torch.float64 else x.float()


def time_features(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """cos and sin of t·ω, ω from 1 down to 1/max_period: (B,) -> (B, width); DiT's convention."""
    half = width // 2
    t = at_least_float32(t)
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_2d(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (grid², width); columns first, as in MAE and DiT."""

    def sincos_1d(positions: Tensor) -> Tensor:
        omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
        angles = positions.flatten()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    axis = torch.arange(grid, dtype=torch.float64)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    return torch.cat([sincos_1d(column), sincos_1d(row)], dim=1).float()
