"""Networks of the diffusers library as velocity networks, without a change to their code.

diffusers counts time as noise, σ = 1 − t, and hands its networks the timestep 1000·σ; its flow
networks predict noise − data, which is −v (`FlowMatchEulerDiscreteScheduler`). Times in (1, 2]
become timesteps in [−1000, 0): the sinusoidal embedding tells them apart by the signs of its
sines, so the second half of the expanded interval is a domain of its own here too.

diffusers is not imported: whoever has one of its networks has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from facm_core.errors import InvalidInputError, require
from facm_core.models.base import Condition, entries, entry, null_labels
from facm_core.models.lightning_dit import at_least_float32


class DiffusersAdapter(nn.Module):
    """Velocity network around the transformer `network`, in whose dtype it computes.

    Call: ``model(x, t, condition)`` with x (B, C, H, W) and t (B,) in [0, 2]; returns a velocity
    like x.
    """

    second_time = False

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @property
    def blocks(self) -> nn.ModuleList:
        """The network's own transformer blocks."""
        return self.network.transformer_blocks

    @property
    def time_embedders(self) -> list[nn.Module]:
        """The networks' time MLPs, by diffusers' own class for them (FSDP derives from it)."""
        return [
            module
            for module in self.network.modules()
            if any(cls.__name__ == "TimestepEmbedding" for cls in type(module).__mro__)
        ]

    @property
    def shared_parts(self) -> tuple[nn.Module, ...]:
        """None."""
        return ()

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None
    ) -> Tensor:
        """Velocity like x.

        Raises:
            InvalidInputError: `condition` lacks what the network reads.
            ValueError: r was given.
        """
        if r is not None:
            raise ValueError("second_time = False, but r was given")
        timestep = 1000 * (1 - at_least_float32(t))
        return self.velocity(x.to(self.network.dtype), timestep, condition).to(x.dtype)

    def velocity(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The network's output as a velocity."""
        raise NotImplementedError

    def null_condition(self, condition: Condition) -> Condition:
        """The unconditional counterpart of `condition`."""
        raise NotImplementedError


class DiTAdapter(DiffusersAdapter):
    """`DiTTransformer2DModel`, conditioned on labels (B,); its last embedding is the null label.

    The published networks predict the noise and its variance (arXiv 2212.09748), so this is their
    architecture and not their task: the first C output channels are the velocity, and those of the
    variance, where there are any, are left out. From published weights, train a teacher first.

    Label dropout is drawn outside the network, so the network's own is switched off.
    """

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        channels, out_channels = network.config.in_channels, network.out_channels
        require(
            out_channels in (channels, 2 * channels),
            "network.out_channels",
            out_channels,
            f"neither in_channels = {channels} nor twice that",
            "Use a network whose output holds a velocity like its input",
        )
        for block in network.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            block.norm1.emb.time_proj.register_forward_pre_hook(_refuse_rounded_timestep)

    @property
    def shared_parts(self) -> tuple[nn.Module, ...]:
        """The first block's embedding of t and label, which the output layer reads as well."""
        return (self.network.transformer_blocks[0].norm1.emb,)

    def velocity(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The first C channels of the output."""
        (output,) = self.network(x, timestep, entry(condition, "label"), return_dict=False)
        return output[:, : x.shape[1]]

    def null_condition(self, condition: Condition) -> Condition:
        """The null label in every row."""
        return null_labels(condition, self.network.config.num_embeds_ada_norm)


class TextAdapter(DiffusersAdapter):
    """A flow network conditioned on embeddings of a prompt.

    Args:
        network: Its output is noise − data.
        null: The embeddings of the null prompt, named like those of a condition: one row of each,
            without the batch dimension. Guidance and condition dropout need them.
    """

    def __init__(self, network: Any, *, null: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(network)
        channels = network.config.in_channels
        out_channels = network.config.out_channels or channels
        require(
            out_channels == channels,
            "network.out_channels",
            out_channels,
            f"not in_channels = {channels}",
            "Use a network that reads a noisy latent and nothing beside it",
        )
        self.null_names = frozenset(null or ())
        for name, row in (null or {}).items():
            self.register_buffer(f"null_{name}", row)

    def null_condition(self, condition: Condition) -> dict[str, Tensor]:
        """The null prompt in every row.

        Raises:
            InvalidInputError: the null prompt has other entries, or another length.
        """
        found = entries(condition)
        require(
            found.keys() == self.null_names,
            "null",
            sorted(self.null_names),
            f"the condition has {sorted(found)}",
            "Give the adapter one row of each: adapt(network, null={...})",
        )
        return {name: self._null_rows(name, value) for name, value in found.items()}

    def _null_rows(self, name: str, value: Tensor) -> Tensor:
        null = self.get_buffer(f"null_{name}")
        require(
            null.shape == value.shape[1:],
            f"null.{name}",
            tuple(null.shape),
            f"a row of the condition has shape {tuple(value.shape[1:])}",
            "Encode the null prompt like the others",
        )
        return null.to(value).expand_as(value)


class SD3Adapter(TextAdapter):
    """`SD3Transformer2DModel` (arXiv 2403.03206): Stable Diffusion 3 and 3.5.

    Condition: ``text_embedding`` (B, L, D) and ``pooled_embedding`` (B, P). The network attends to
    every row of the embedding, padding included.
    """

    def velocity(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Minus the output."""
        text = entry(condition, "text_embedding").to(x.dtype)
        pooled = entry(condition, "pooled_embedding").to(x.dtype)
        (output,) = self.network(x, text, pooled, timestep, return_dict=False)
        return -output


class WanAdapter(TextAdapter):
    """`WanTransformer3DModel` (arXiv 2503.20314): Wan 2.1 and 2.2, text to image or video.

    Condition: ``text_embedding`` (B, L, D) and optionally ``text_mask`` (B, L), true on the prompt
    and false on padding, whose embeddings become zero, as in Wan's pipeline: the network attends
    to them nevertheless. An image x (B, C, H, W) is a video of one frame; a video is
    (B, C, T, H, W).
    """

    @property
    def blocks(self) -> nn.ModuleList:
        """The network's own transformer blocks."""
        return self.network.blocks

    def velocity(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Minus the output."""
        text = entry(condition, "text_embedding").to(x.dtype)
        if "text_mask" in condition:
            text = text * entry(condition, "text_mask")[..., None].to(x.dtype)
        video = x if x.ndim == 5 else x.unsqueeze(2)
        (output,) = self.network(video, timestep, text, return_dict=False)
        return -output.reshape(x.shape)


ADAPTERS: dict[str, type[DiffusersAdapter]] = {
    "DiTTransformer2DModel": DiTAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "WanTransformer3DModel": WanAdapter,
}


def adapt(network: nn.Module, **settings: Any) -> DiffusersAdapter:
    """The velocity network around a diffusers transformer, chosen by its class.

    Args:
        network: One of `ADAPTERS`, or of a class derived from it.
        settings: Keyword arguments of the adapter.

    Raises:
        InvalidInputError: there is no adapter for this class.
    """
    for cls in type(network).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__](network, **settings)
    raise InvalidInputError(
        "network",
        type(network).__name__,
        "there is no adapter for this class",
        f"Use one of {', '.join(ADAPTERS)}, or a module like facm_core.models.base.VelocityModel",
    )


def _refuse_rounded_timestep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Each block of a DiT embeds the timestep itself, and FSDP may have rounded its inputs."""
    (timestep,) = args
    require(
        timestep.dtype in (torch.float32, torch.float64),
        "timestep.dtype",
        timestep.dtype,
        "rounds timesteps by up to 4",
        "Shard the blocks with MixedPrecisionPolicy(cast_forward_inputs=False)",
    )
