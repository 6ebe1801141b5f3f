"""LightningDiT against a functional reference of the published architecture (arXiv 2501.01423)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.models import LightningDiT, LightningDiTConfig

WIDTH, HEADS, PATCH, SIZE, CHANNELS, CLASSES = 16, 2, 2, 4, 3, 5
GRID = SIZE // PATCH

# Published names, and the shapes they have at depth 1 and the sizes above.
PUBLISHED = {
    "pos_embed": (1, 4, 16),
    "x_embedder.proj.weight": (16, 3, 2, 2),
    "x_embedder.proj.bias": (16,),
    "t_embedder.mlp.0.weight": (16, 256),
    "t_embedder.mlp.0.bias": (16,),
    "t_embedder.mlp.2.weight": (16, 16),
    "t_embedder.mlp.2.bias": (16,),
    "y_embedder.embedding_table.weight": (6, 16),
    "feat_rope.freqs_cos": (4, 8),
    "feat_rope.freqs_sin": (4, 8),
    "blocks.0.norm1.weight": (16,),
    "blocks.0.norm2.weight": (16,),
    "blocks.0.attn.qkv.weight": (48, 16),
    "blocks.0.attn.qkv.bias": (48,),
    "blocks.0.attn.q_norm.weight": (8,),
    "blocks.0.attn.k_norm.weight": (8,),
    "blocks.0.attn.proj.weight": (16, 16),
    "blocks.0.attn.proj.bias": (16,),
    "blocks.0.mlp.w12.weight": (84, 16),
    "blocks.0.mlp.w12.bias": (84,),
    "blocks.0.mlp.w3.weight": (16, 42),
    "blocks.0.mlp.w3.bias": (16,),
    "blocks.0.adaLN_modulation.1.weight": (96, 16),
    "blocks.0.adaLN_modulation.1.bias": (96,),
    "final_layer.norm_final.weight": (16,),
    "final_layer.linear.weight": (12, 16),
    "final_layer.linear.bias": (12,),
    "final_layer.adaLN_modulation.1.weight": (32, 16),
    "final_layer.adaLN_modulation.1.bias": (32,),
}
PUBLISHED_AUXILIARY = {
    "r_embedder.mlp.0.weight": (16, 256),
    "r_embedder.mlp.0.bias": (16,),
    "r_embedder.mlp.2.weight": (16, 16),
    "r_embedder.mlp.2.bias": (16,),
}


class Reference:
    """The published forward pass, on a state dict."""

    def __init__(self, weights: dict[str, Tensor], depth: int) -> None:
        self.w, self.depth = weights, depth

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
        h = torch.einsum("bcijpq,dcpq->bijd", patches, self.w["x_embedder.proj.weight"])
        h = h.flatten(1, 2) + self.w["x_embedder.proj.bias"] + self.w["pos_embed"]
        c = self.time("t_embedder", t) + self.w["y_embedder.embedding_table.weight"][y]
        if r is not None:
            c = c + self.time("r_embedder", r)
        for i in range(self.depth):
            h = self.block(f"blocks.{i}.", h, c)
        shift, scale = self.modulation("final_layer.", c, 2)
        h = self.norm("final_layer.norm_final", h) * (1 + scale) + shift
        out = self.linear("final_layer.linear", h).view(-1, GRID, GRID, PATCH, PATCH, CHANNELS)
        return torch.einsum("bijpqc->bcipjq", out).reshape(x.shape)

    def block(self, name: str, h: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(name, c, 6)
        a = self.norm(name + "norm1", h) * (1 + scale_a) + shift_a
        h = h + gate_a * self.attention(name + "attn.", a)
        m = self.norm(name + "norm2", h) * (1 + scale_m) + shift_m
        up, side = self.linear(name + "mlp.w12", m).tensor_split(2, dim=-1)
        return h + gate_m * self.linear(name + "mlp.w3", up / (1 + torch.exp(-up)) * side)

    def attention(self, name: str, h: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.linear(name + "qkv", h).tensor_split(3, dim=-1)
        )
        q, k = (
            self.rotate(self.norm(name + "q_norm", q)),
            self.rotate(self.norm(name + "k_norm", k)),
        )
        scores = torch.einsum("bhik,bhjk->bhij", q, k) / math.sqrt(WIDTH / HEADS)
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        return self.linear(name + "proj", (weights @ v).transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor) -> Tensor:
        """Neighbouring channels are the real and the imaginary part."""
        cos, sin = (self.w[f"feat_rope.freqs_{name}"][:, ::2] for name in ("cos", "sin"))
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)

    def time(self, name: str, t: Tensor) -> Tensor:
        """The frequencies are float32, as published."""
        omega = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        features = torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], dim=1)
        hidden = self.linear(name + ".mlp.0", features)
        return self.linear(name + ".mlp.2", hidden * torch.sigmoid(hidden))

    def modulation(self, name: str, c: Tensor, parts: int) -> tuple[Tensor, ...]:
        c = c * torch.sigmoid(c)
        return self.linear(name + "adaLN_modulation.1", c)[:, None].tensor_split(parts, dim=-1)

    def norm(self, name: str, h: Tensor) -> Tensor:
        return h / ((h**2).mean(-1, keepdim=True) + 1e-6) ** 0.5 * self.w[name + ".weight"]

    def linear(self, name: str, h: Tensor) -> Tensor:
        return h @ self.w[name + ".weight"].T + self.w[name + ".bias"]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.0, 0.3, 1.0, 1.9], dtype=torch.float64)
    return x, t, torch.tensor([0, 4, CLASSES, 2])


@pytest.mark.parametrize("second_time", [False, True])
def test_forward(second_time: bool, make_model: Any, batch: tuple[Tensor, ...]) -> None:
    model = make_model(seed=4, second_time=second_time)
    r = 1 - batch[1] / 2 if second_time else None
    expected = Reference(model.state_dict(), depth=2)(*batch, r)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(*batch, r), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("second_time", [False, True])
def test_published_names_and_shapes(second_time: bool, make_model: Any) -> None:
    expected = PUBLISHED | (PUBLISHED_AUXILIARY if second_time else {})
    weights = make_model(depth=1, second_time=second_time).state_dict()
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected


def test_fixed_tables(make_model: Any) -> None:
    """Rows turn the first half of a head's channels; columns come first in `pos_embed`."""
    weights = make_model(input_size=6, hidden_size=32).float().state_dict()
    places = [(row, column) for row in range(3) for column in range(3)]

    half, quarter = 32 // 2 // 2, 32 // 4
    angles = torch.tensor(
        [[p * 10_000 ** -(2 * (k // 2) / half) for p in rc for k in range(half)] for rc in places]
    )
    torch.testing.assert_close(weights["feat_rope.freqs_cos"], angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights["feat_rope.freqs_sin"], angles.sin(), rtol=0, atol=1e-6)

    expected = [
        [f(p * 10_000 ** -(k / quarter)) for p in (c, r) for f in (math.sin, math.cos)
         for k in range(quarter)]
        for r, c in places
    ]  # fmt: skip
    torch.testing.assert_close(
        weights["pos_embed"], torch.tensor(expected)[None], rtol=0, atol=1e-6
    )


def parameters_by_hand(depth: int, d: int, patch: int, heads: int) -> int:
    """Published latent: 32 × 16 × 16, 1,000 classes; all but the fixed position table.

    XL/1 has 674,965,856: the 675 M of the papers.
    """
    m, patch_values = int(8 / 3 * d), 32 * patch**2
    attention = (d * 3 * d + 3 * d) + 2 * (d // heads) + (d * d + d)
    mlp = (d * 2 * m + 2 * m) + (m * d + d)
    block = 2 * d + attention + mlp + (d * 6 * d + 6 * d)
    embeddings = (patch_values * d + d) + (256 * d + d + d * d + d) + 1001 * d
    final = d + (d * patch_values + patch_values) + (d * 2 * d + 2 * d)
    return depth * block + embeddings + final


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("B/1", (12, 768, 1, 12), 130.36),
        ("L/2", (24, 1024, 2, 16), 458.09),
        ("XL/1", (28, 1152, 1, 16), 674.97),
        ("XL/2", (28, 1152, 2, 16), 675.19),
        ("1p0B/1", (24, 1536, 1, 24), 1029.01),
        ("1p6B/2", (28, 1792, 2, 28), 1631.66),
    ],
)
def test_presets(name: str, sizes: tuple[int, int, int, int], millions: float) -> None:
    with torch.device("meta"):
        model = LightningDiT.preset(name)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == parameters_by_hand(*sizes)
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


def test_preset_settings() -> None:
    model = LightningDiT.preset("B/2", depth=1, hidden_size=48, in_channels=4, second_time=True)
    assert model.config == LightningDiTConfig(
        input_size=16,
        in_channels=4,
        patch_size=2,
        hidden_size=48,
        depth=1,
        num_heads=12,
        num_classes=1000,
        second_time=True,
    )
    with pytest.raises(InvalidInputError, match=r"preset = 'XXL/1': unknown choice.*XL/1"):
        LightningDiT.preset("XXL/1")


def test_starts_at_zero_and_a_second_time_adds_nothing_at_first(
    make_model: Any, batch: tuple[Tensor, ...]
) -> None:
    config = make_model(second_time=True).config
    fresh = LightningDiT(config).double()
    assert torch.equal(fresh(*batch, batch[1]), torch.zeros_like(batch[0]))

    trained = make_model(seed=4)
    fresh.load_state_dict(fresh.state_dict() | trained.state_dict())
    torch.testing.assert_close(fresh(*batch, batch[1]), trained(*batch), rtol=1e-12, atol=1e-12)
    trained_r = fresh.r_embedder.mlp[2].weight
    fresh(*batch, batch[1]).sum().backward()
    assert trained_r.grad.norm() > 0  # but it can be learned


def test_the_second_time_must_be_given_exactly_where_there_is_one(
    make_model: Any, batch: tuple[Tensor, ...]
) -> None:
    with pytest.raises(ValueError, match="second_time = True, but r was not given"):
        make_model(second_time=True)(*batch)
    with pytest.raises(ValueError, match="second_time = False, but r was given"):
        make_model()(*batch, batch[1])


@pytest.mark.parametrize("classes", [5, 10, 1000])
def test_null_condition(classes: int, make_model: Any) -> None:
    model = make_model(num_classes=classes)
    labels = torch.tensor([0, 3])
    assert model.null_condition(labels).tolist() == [classes, classes]
    named = model.null_condition({"label": labels, "key": labels})
    assert {name: value.tolist() for name, value in named.items()} == {
        "label": [classes, classes],
        "key": [0, 3],
    }


def test_a_mapping_condition(make_model: Any, batch: tuple[Tensor, ...]) -> None:
    model, (x, t, labels) = make_model(seed=4), batch
    assert torch.equal(model(x, t, {"label": labels}), model(x, t, labels))
    with pytest.raises(InvalidInputError, match=r"condition.label .* the condition has \['text'\]"):
        model(x, t, {"text": labels})


def test_a_time_is_not_rounded_to_bfloat16(make_model: Any) -> None:
    """Between 1 and 2 bfloat16 knows 128 times; these two are one of them."""
    model = make_model(seed=4).bfloat16()
    t = torch.tensor([1.700, 1.703])
    assert t.bfloat16().unique().numel() == 1
    embedded = model.t_embedder(t)
    assert embedded.dtype == torch.bfloat16
    assert not torch.equal(embedded[0], embedded[1])
    exact = Reference({k: v.float() for k, v in model.state_dict().items()}, 2)
    torch.testing.assert_close(embedded.float(), exact.time("t_embedder", t), rtol=0.02, atol=0.02)
    x = torch.zeros(2, CHANNELS, SIZE, SIZE)
    out = model(x, t, torch.tensor([1, 1]))
    assert not torch.equal(out[0], out[1])


def test_the_attention_is_that_of_pytorch(make_model: Any, batch: tuple[Tensor, ...]) -> None:
    """float32 runs the fused kernel; it must agree with the reference all the same."""
    model = make_model(seed=4)
    expected = Reference(model.state_dict(), depth=2)(*batch)
    x, t, labels = batch
    got = model.float()(x.float(), t.float(), labels).double()
    assert F.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 1 - 1e-9
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("input_size", {"input_size": 0}),
        ("in_channels", {"in_channels": 0}),
        ("patch_size", {"patch_size": 3}),
        ("patch_size", {"patch_size": 0}),
        ("hidden_size", {"hidden_size": 12}),
        ("hidden_size", {"hidden_size": 0}),
        ("depth", {"depth": 0}),
        ("num_heads", {"num_heads": 0}),
        ("num_heads", {"num_heads": -2}),
        ("num_classes", {"num_classes": 0}),
        ("mlp_ratio", {"mlp_ratio": 0.0}),
    ],
)
def test_bad_settings_are_named(field: str, settings: dict[str, Any], make_model: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field} = "):
        make_model(**settings)
