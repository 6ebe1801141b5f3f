"""Published weights of KL autoencoders, as diffusers' modules: every key or none.

They are published in two layouts: diffusers' own folder, and the checkpoint of latent diffusion
(CompVis/latent-diffusion, ``ldm/modules/diffusionmodules/model.py``), which LightningDiT's VA-VAE
has too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from facm_core.checkpoints import LoadReport, misfits, read_checkpoint
from facm_core.errors import InvalidInputError, require

WAN = "AutoencoderKLWan"
_CLASSES = ("AutoencoderKL", WAN)

_FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Attention as diffusers named it once; the published sd-vae-ft-* still have these names.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

# Parts of a training checkpoint that are no autoencoder: the loss with its discriminator and
# perceptual network; VA-VAE's vision model and the projection to it; counters of an EMA.
_NO_AUTOENCODER = (
    "loss.",
    "discriminator.",
    "foundation_model.",
    "linear_proj.",
    "model_ema.decay",
    "model_ema.num_updates",
)

# From diffusers' names to those of latent diffusion, in this order.
_LDM_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}


def read_diffusers_folder(path: Path, field: str) -> tuple[Any, LoadReport]:
    """The ``AutoencoderKL`` or ``AutoencoderKLWan`` in a folder as diffusers saves it, or in its
    subfolder ``vae``.

    Raises:
        InvalidInputError: a file is missing or of another kind, or the weights do not fit the
            configuration; `field` is the one at fault.
    """
    folder = path if (path / "config.json").is_file() else path / "vae"
    problem = "neither it nor its subfolder vae has a config.json"
    remedy = f"Give a folder as diffusers saves an {' or '.join(_CLASSES)}"
    require((folder / "config.json").is_file(), field, str(path), problem, remedy)
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(field, str(path), "config.json is no object", remedy) from error
    kind = config.get("_class_name")
    require(kind in _CLASSES, field, str(path), f"config.json describes a {kind}", remedy)
    weights = read_checkpoint(folder / _FOLDER_WEIGHTS, field)
    old = any(".query." in key for key in weights)

    def name_in_file(name: str) -> str:
        for today, before in _OLD_ATTENTION.items() if old else ():
            name = name.replace(f".{today}.", f".{before}.")
        return name

    module = _build(str(kind), config, weights, name_in_file, path, field)
    return module, LoadReport(source=_FOLDER_WEIGHTS, loaded=len(weights), left_in_file=())


def read_ldm_file(path: Path, field: str) -> tuple[Any, LoadReport]:
    """The ``AutoencoderKL`` in a checkpoint file of latent diffusion or of LightningDiT's VA-VAE.

    Its sizes are those of the weights. What a training run saves beside the autoencoder is left
    out, by its known names, and reported; any other key is an error.

    Raises:
        InvalidInputError: no such file, one of another kind, or weights that are no whole
            autoencoder; `field` is the one at fault.
    """
    content = read_checkpoint(path, field)
    source = "state_dict" if isinstance(content.get("state_dict"), Mapping) else ""
    state = {str(key): value for key, value in (content[source] if source else content).items()}
    weights = {key: value for key, value in state.items() if not key.startswith(_NO_AUTOENCODER)}
    others = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    remedy = "Give a checkpoint whose weights are at its top or under state_dict"
    require(not others, field, str(path), f"no tensors: {', '.join(others)}", remedy)
    config = _ldm_config(weights, path, field)
    last = len(config["block_out_channels"]) - 1

    def name_in_file(name: str) -> str:
        for ours, theirs in _LDM_NAMES.items():
            name = name.replace(ours, theirs)
        # Latent diffusion numbers the levels of the decoder by resolution, not by order.
        return re.sub(r"up_blocks\.(\d+)", lambda level: f"up.{last - int(level[1])}", name)

    # Its attention is made of 1x1 convolutions, diffusers' of the linear maps that they are.
    linear = {
        key: value[:, :, 0, 0] if ".attn" in key and value.shape[2:] == (1, 1) else value
        for key, value in weights.items()
    }
    module = _build(_CLASSES[0], config, linear, name_in_file, path, field)
    left = state.keys() - weights.keys()
    if source:
        left |= {str(key) for key in content if key != source}
    return module, LoadReport(source=source, loaded=len(weights), left_in_file=tuple(sorted(left)))


def _ldm_config(weights: Mapping[str, Tensor], path: Path, field: str) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder, from the shapes of its weights (32 groups)."""
    remedy = "Give an autoencoder's checkpoint in the layout of latent diffusion"

    def last(pattern: str) -> int:
        found = (re.match(pattern, key) for key in weights)
        return max((int(match[1]) for match in found if match), default=0)

    def shape(key: str) -> torch.Size:
        is_there = key in weights and weights[key].ndim == 4
        require(is_there, field, str(path), f"missing {key}, the weight of a convolution", remedy)
        return weights[key].shape

    def block_type(part: str, name: str) -> str:
        has_attention = any(key.startswith(f"{part}.attn.") for key in weights)
        return f"Attn{name}" if has_attention else name

    levels = range(last(r"encoder\.down\.(\d+)\.") + 1)
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("encoder.conv_out.weight")[0] // 2,
        "block_out_channels": [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels],
        "layers_per_block": last(r"encoder\.down\.\d+\.block\.(\d+)\.") + 1,
        "down_block_types": [block_type(f"encoder.down.{i}", "DownEncoderBlock2D") for i in levels],
        "up_block_types": [
            block_type(f"decoder.up.{i}", "UpDecoderBlock2D") for i in reversed(levels)
        ],
        "norm_num_groups": 32,
    }


def _build(
    kind: str,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    name_in_file: Callable[[str], str],
    path: Path,
    field: str,
) -> Any:
    """The autoencoder of `config` with float32 copies of `weights`, each of them needed."""
    try:
        import diffusers
    except ImportError as error:
        problem = "diffusers is needed to compute it, and is not installed"
        raise InvalidInputError(field, str(path), problem, "Install diffusers") from error
    remedy = f"Give the configuration of an {kind}, or install a diffusers that knows it"
    try:
        with torch.device("meta"):  # No weights are drawn at random only to be replaced.
            cls = getattr(cast(Any, diffusers), kind)
            built = cls.from_config(config, return_unused_kwargs=True)
    except (AttributeError, TypeError, ValueError) as error:
        problem = f"diffusers cannot build its configuration: {error}"
        raise InvalidInputError(field, str(path), problem, remedy) from error
    module, unused = built
    unknown = ", ".join(sorted(key for key in unused if not key.startswith("_")))
    problem = f"diffusers does not know {unknown} of its configuration"
    require(not unknown, field, str(path), problem, remedy)
    expected = module.state_dict()
    problems = misfits(weights, {name_in_file(name): value for name, value in expected.items()})
    problem = f"its weights are no whole autoencoder: {'; '.join(problems)}"
    require(not problems, field, str(path), problem, "Give the published weights, unchanged")
    module.float().to_empty(device="cpu")
    module.load_state_dict({name: weights[name_in_file(name)] for name in expected})
    return module
