"""Image <-> latent: the interface, pixels as their own latents, and KL autoencoders.

No scaling factor appears anywhere: latents are the autoencoder's own, and whoever trains on them
normalises them with the mean and deviation in the manifest of their latent set.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from facm_core.autoencoder_files import read_diffusers_folder, read_ldm_file
from facm_core.checkpoints import LoadReport
from facm_core.errors import InvalidInputError, require

ImageShape = tuple[int, int, int]
"""Channels, height, width."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The Gaussian over latents that an image is encoded to, each latent on its own.

    Attributes:
        mean: Float32 (B, c, h, w).
        log_variance: Of the same shape, or None where the encoding is deterministic.
    """

    mean: Tensor
    log_variance: Tensor | None

    def sample(self, noise: Tensor) -> Tensor:
        """Mean + deviation · noise (B, c, h, w); the mean itself where there is no variance."""
        if self.log_variance is None:
            return self.mean
        return self.mean + torch.exp(self.log_variance / 2) * noise


class Autoencoder(Protocol):
    """A frozen pair of maps. Images are float32 (B, C, H, W) in [-1, 1].

    Inputs are on the autoencoder's device. Outputs are float32 whatever it computes in, and carry
    no gradient. Latents are not normalised: see the module's docstring.

    Attributes:
        id: The name it was loaded by.
        sha256: Hash of everything that determines its outputs (weights and configuration).
        stochastic: Whether its moments have a log-variance.
    """

    id: str
    sha256: str
    stochastic: bool

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """Shape of one latent, given the shape of one image.

        Raises:
            InvalidInputError: images of that shape cannot be encoded.
        """

    def encode(self, images: Tensor) -> Moments:
        """Images (B, C, H, W) to the moments of their latents (B, c, h, w)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to images (B, C, H, W), clipped to [-1, 1]."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
        """The same autoencoder on `device`, computing in `dtype`; this one stays as it is."""


class IdentityAutoencoder:
    """Latents are the pixels themselves; decoding clips to the range of images."""

    id = "identity"
    sha256 = hashlib.sha256(b"identity").hexdigest()
    stochastic = False

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """The image's own shape."""
        return image_shape

    def encode(self, images: Tensor) -> Moments:
        """The images as float32."""
        return Moments(mean=images.float(), log_variance=None)

    def decode(self, latents: Tensor) -> Tensor:
        """The latents as float32, clipped to [-1, 1]."""
        return latents.float().clamp(-1.0, 1.0)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> IdentityAutoencoder:
        """Itself: it has no weights and computes nothing."""
        return self


class KLAutoencoder:
    """diffusers' ``AutoencoderKL`` (arXiv 2112.10752, section 3.1) as an `Autoencoder`.

    Args:
        id: Its name.
        module: The ``AutoencoderKL``, whose weights are float32.
        report: Where its weights came from.
    """

    stochastic = True

    def __init__(self, id: str, module: Any, report: LoadReport) -> None:
        self.id = id
        self.report = report
        self.sha256 = _sha256(module)
        self._module = module.eval().requires_grad_(False)

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """Shape of one latent: every level but the last halves height and width.

        Raises:
            InvalidInputError: other channels than the autoencoder's, or sides that cannot be
                halved that often.
        """
        config = self._module.config
        channels, height, width = image_shape
        factor = 2 ** (len(config.block_out_channels) - 1)
        problem = f"{self.id} encodes images of {config.in_channels} channels"
        remedy = f"Give images of {config.in_channels} channels"
        require(channels == config.in_channels, "image_shape", image_shape, problem, remedy)
        problem = f"{self.id} reduces height and width {factor} times"
        remedy = f"Resize or crop the images to multiples of {factor}"
        fits = height % factor == 0 and width % factor == 0
        require(fits, "image_shape", image_shape, problem, remedy)
        return config.latent_channels, height // factor, width // factor

    def encode(self, images: Tensor) -> Moments:
        """Images (B, C, H, W) to moments (B, c, h, w); the log-variance lies in [-30, 20].

        Raises:
            InvalidInputError: images of a shape that `latent_shape` refuses.
        """
        _, channels, height, width = images.shape
        self.latent_shape((channels, height, width))
        with torch.inference_mode():
            posterior = self._module.encode(images.to(self._module.dtype)).latent_dist
        # Copied out here, because autograd refuses the tensors that inference mode makes.
        return Moments(
            mean=posterior.mean.to(torch.float32, copy=True),
            log_variance=posterior.logvar.to(torch.float32, copy=True),
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to images (B, C, H, W), clipped to [-1, 1]."""
        with torch.inference_mode():
            images = self._module.decode(latents.to(self._module.dtype)).sample
        return images.float().clamp(-1.0, 1.0)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> KLAutoencoder:
        """A copy on `device` with its weights in `dtype`, under the same `sha256`.

        A narrower dtype rounds the copy's weights, and a wider one does not bring them back.
        """
        other = copy.copy(self)
        # nn.Module's own `to`: diffusers' warns of modules to keep in float32 where there is none.
        other._module = nn.Module.to(copy.deepcopy(self._module), device=device, dtype=dtype)
        return other


def load_autoencoder(id: str, path: Path | None = None, field: str = "autoencoder") -> Autoencoder:
    """The autoencoder of that name, on the CPU and in float32.

    Args:
        id: ``identity``, or any name for the weights at `path`; it only becomes the `id`.
        path: None for the identity. Else a folder as diffusers saves an ``AutoencoderKL`` (or a
            pipeline, with it in ``vae/``), or one file in the layout of latent diffusion: a
            ``.safetensors`` file, or a ``.pt`` or ``.ckpt`` file, whose code is never executed.
        field: The field at fault in an error about `id`; ``<field>_path`` is the one for `path`.

    Raises:
        InvalidInputError: no path where one is needed or one where none is, nothing of that kind
            there, weights that do not fill the autoencoder exactly (every missing or unexpected
            key and differing shape is listed), or diffusers is not installed.
    """
    if id == IdentityAutoencoder.id:
        remedy = "Leave it out, or name the autoencoder otherwise"
        require(path is None, f"{field}_path", path, "the identity has no weights", remedy)
        return IdentityAutoencoder()
    if path is None:
        remedy = "Use identity, or give the path of the autoencoder's folder or file"
        raise InvalidInputError(field, id, "it has weights, but no path leads to them", remedy)
    read = read_diffusers_folder if path.is_dir() else read_ldm_file
    return KLAutoencoder(id, *read(path, f"{field}_path"))


def _sha256(module: Any) -> str:
    """Hash of the configuration and the weights, whatever file they came from."""
    # The rest of the configuration either shows in the names and shapes of the weights or, as the
    # scaling factor, bears on no output.
    fields = ("act_fn", "norm_num_groups", "down_block_types", "up_block_types")
    digest = hashlib.sha256(json.dumps([module.config[name] for name in fields]).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.numpy())
    return digest.hexdigest()
