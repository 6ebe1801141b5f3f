"""Names and shapes of Wan's published weights, against the architecture written out.

The index of Wan 2.2's 14B experts could not be had; public notes on it say: 1,095 tensors, all
float32, `total_size` 4 · 14,288,491,584. That of Wan 2.2's 5B, in Wan's own names, is in
github.com/tky135/FastWAM (``diffusion_pytorch_model.safetensors.index.json``). Its names in blocks
0 to 13 (27 each) and outside the blocks (15) were read beside the table below and are the same; its
`total_size` is 19,999,150,848. Of the 1.3B, there was nothing to compare the number with.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from facm_core.models.wan import build_wan, wan_preset

Shapes = dict[str, tuple[int, ...]]
TIME, TEXT = 256, 4096  # features of a time, channels of a prompt


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def attention(name: str, d: int) -> Shapes:
    projections = [linear(f"{name}.{part}", d, d) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    norms = {f"{name}.{part}.weight": (d,) for part in ("norm_q", "norm_k")}
    return {key: shape for shapes in (*projections, norms) for key, shape in shapes.items()}


def architecture(layers: int, d: int, mlp: int, channels: int) -> Shapes:
    """diffusers' names; Wan's own beside them."""
    block = {
        "scale_shift_table": (1, 6, d),  # modulation
        **attention("attn1", d),  # self_attn
        **attention("attn2", d),  # cross_attn
        "norm2.weight": (d,),  # norm3: the only norm with weights
        "norm2.bias": (d,),
        **linear("ffn.net.0.proj", d, mlp),  # ffn.0
        **linear("ffn.net.2", mlp, d),  # ffn.2
    }
    embedder = "condition_embedder"
    return {
        "patch_embedding.weight": (d, channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        **linear(f"{embedder}.text_embedder.linear_1", TEXT, d),  # text_embedding.0
        **linear(f"{embedder}.text_embedder.linear_2", d, d),  # text_embedding.2
        **linear(f"{embedder}.time_embedder.linear_1", TIME, d),  # time_embedding.0
        **linear(f"{embedder}.time_embedder.linear_2", d, d),  # time_embedding.2
        **linear(f"{embedder}.time_proj", d, 6 * d),  # time_projection.1
        "scale_shift_table": (1, 2, d),  # head.modulation
        **linear("proj_out", d, 4 * channels),  # head.head
        **{f"blocks.{i}.{name}": shape for i in range(layers) for name, shape in block.items()},
    }


@pytest.mark.parametrize(
    ("name", "sizes", "tensors", "parameters"),
    [
        ("wan-1.3b", (30, 1536, 8960, 16), 825, 1_418_996_800),
        ("wan-5b", (30, 3072, 14336, 48), 825, 19_999_150_848 // 4),
        ("wan-14b", (40, 5120, 13824, 16), 1095, 14_288_491_584),
    ],
)
def test_the_network_is_that_of_the_published_weights(
    name: str, sizes: Any, tensors: int, parameters: int
) -> None:
    expected = architecture(*sizes)
    assert len(expected) == tensors
    assert sum(math.prod(shape) for shape in expected.values()) == parameters
    with torch.device("meta"):
        network = build_wan(wan_preset(name, height=90, width=160)).network
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected
