"""Image <-> latent: the interface, pixels as their own latents, and KL autoencoders.

No scaling factor is applied anywhere: latents are the autoencoder's own, and whoever trains on them
normalises them with the mean and deviation in the manifest of their latent set.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from facm_core.autoencoder_files import WAN, read_diffusers_folder, read_ldm_file
from facm_core.checkpoints import LoadReport
from facm_core.errors import InvalidInputError, require

ImageShape = tuple[int, int, int]
"""Channels, height, width."""

Floats = tuple[float, ...]


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

    @property
    def normalisation(self) -> tuple[Floats, Floats] | None:
        """Mean and deviation of each channel, under which the networks that go with it were
        trained; None: those of the latents at hand are used."""

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
    normalisation = None

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
    normalisation: tuple[Floats, Floats] | None = None
    # The rest of the configuration either shows in the names and shapes of the weights or, as the
    # scaling factor, bears on no output.
    _HASHED: tuple[str, ...] = ("act_fn", "norm_num_groups", "down_block_types", "up_block_types")

    def __init__(self, id: str, module: Any, report: LoadReport) -> None:
        self.id = id
        self.report = report
        self.sha256 = _sha256(module, self._HASHED)
        self._module = module.eval().requires_grad_(False)

    @property
    def image_channels(self) -> int:
        """C of an image."""
        return int(self._module.config.in_channels)

    @property
    def latent_channels(self) -> int:
        """c of a latent."""
        return int(self._module.config.latent_channels)

    @property
    def stride(self) -> int:
        """By how much it reduces height and width: every level but the last halves them."""
        return int(2 ** (len(self._module.config.block_out_channels) - 1))

    def latent_shape(self, image_shape: ImageShape) -> ImageShape:
        """Shape of one latent: height and width reduced by `stride`.

        Raises:
            InvalidInputError: other channels than the autoencoder's, or sides that are no multiples
                of the stride.
        """
        channels, height, width = image_shape
        stride, wanted = self.stride, self.image_channels
        problem = f"{self.id} encodes images of {wanted} channels"
        remedy = f"Give images of {wanted} channels"
        require(channels == wanted, "image_shape", image_shape, problem, remedy)
        problem = f"{self.id} reduces height and width {stride} times"
        remedy = f"Resize or crop the images to multiples of {stride}"
        fits = height % stride == 0 and width % stride == 0
        require(fits, "image_shape", image_shape, problem, remedy)
        return self.latent_channels, height // stride, width // stride

    def encode(self, images: Tensor) -> Moments:
        """Images (B, C, H, W) to moments (B, c, h, w); the log-variance lies in [-30, 20].

        Raises:
            InvalidInputError: images of a shape that `latent_shape` refuses.
        """
        _, channels, height, width = images.shape
        self.latent_shape((channels, height, width))
        with torch.inference_mode():
            posterior = self._module.encode(self._in(images)).latent_dist
        # Copied out here, because autograd refuses the tensors that inference mode makes.
        return Moments(mean=self._out(posterior.mean), log_variance=self._out(posterior.logvar))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to images (B, C, H, W), clipped to [-1, 1]."""
        with torch.inference_mode():
            images = self._module.decode(self._in(latents)).sample
        return self._out(images).clamp(-1.0, 1.0)

    def _in(self, values: Tensor) -> Tensor:
        """As the module takes them."""
        return values.to(self._module.dtype)

    def _out(self, values: Tensor) -> Tensor:
        """What the module gave, as a new float32 tensor (B, C, H, W)."""
        return values.to(torch.float32, copy=True)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """A copy on `device` with its weights in `dtype`, under the same `sha256`.

        A narrower dtype rounds the copy's weights, and a wider one does not bring them back.
        """
        other = copy.copy(self)
        # nn.Module's own `to`: diffusers' warns of modules to keep in float32 where there is none.
        other._module = nn.Module.to(copy.deepcopy(self._module), device=device, dtype=dtype)
        return other


class WanAutoencoder(KLAutoencoder):
    """diffusers' ``AutoencoderKLWan`` (arXiv 2503.20314, section 4.1), of Wan 2.1 or of 2.2's 5B.

    An image is a video of one frame.

    Args:
        id: Its name.
        module: The ``AutoencoderKLWan``, whose weights are float32.
        report: Where its weights came from.
        field: The one at fault in an error.

    Raises:
        InvalidInputError: its configuration holds no usable normalisation.
    """

    normalisation: tuple[Floats, Floats]
    # Patches are cut before the first weight.
    _HASHED = ("patch_size",)

    def __init__(self, id: str, module: Any, report: LoadReport, field: str) -> None:
        # Theirs rounds to float32; nothing is rounded by repeating a value.
        for part in module.modules():
            if type(part).__name__ == "WanUpsample":
                part.__class__ = nn.Upsample
        super().__init__(id, module, report)
        self.normalisation = self._normalisation(field)

    def _normalisation(self, field: str) -> tuple[Floats, Floats]:
        config, channels = self._module.config, self.latent_channels
        mean, std = (tuple(map(float, config[f"latents_{name}"])) for name in ("mean", "std"))
        for name, values, fits in (
            ("mean", mean, all(map(math.isfinite, mean))),
            ("std", std, all(math.isfinite(value) and value > 0 for value in std)),
        ):
            problem = f"latents_{name} of its configuration is not one such number for each channel"
            remedy = "Restore the published config.json"
            require(fits and len(values) == channels, field, self.id, problem, remedy)
        return mean, std

    @property
    def image_channels(self) -> int:
        """Those of the first convolution, which sees patches."""
        return int(self._module.config.in_channels) // self._patch**2

    @property
    def latent_channels(self) -> int:
        """16 for Wan 2.1, 48 for 2.2's 5B."""
        return int(self._module.config.z_dim)

    @property
    def stride(self) -> int:
        """8 for Wan 2.1; 16, patches included, for 2.2's 5B."""
        return int(2 ** (len(self._module.config.dim_mult) - 1)) * self._patch

    @property
    def _patch(self) -> int:
        return int(self._module.config.patch_size or 1)

    def _in(self, values: Tensor) -> Tensor:
        return super()._in(values).unsqueeze(2)

    def _out(self, values: Tensor) -> Tensor:
        return super()._out(values).squeeze(2)


def load_autoencoder(id: str, path: Path | None = None, field: str = "autoencoder") -> Autoencoder:
    """The autoencoder of that name, on the CPU and in float32.

    Args:
        id: ``identity``, or any name for the weights at `path`; it only becomes the `id`.
        path: None for the identity. Else a folder as diffusers saves an ``AutoencoderKL`` or
            ``AutoencoderKLWan`` (or a pipeline, with it in ``vae/``), or one file in the layout of
            latent diffusion: a ``.safetensors`` file, or a ``.pt`` or ``.ckpt`` file, whose code is
            never executed.
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
    module, report = read(path, f"{field}_path")
    if type(module).__name__ == WAN:
        return WanAutoencoder(id, module, report, f"{field}_path")
    return KLAutoencoder(id, module, report)


def _sha256(module: Any, fields: tuple[str, ...]) -> str:
    """Hash of these fields of the configuration and of the weights, whatever their file."""
    digest = hashlib.sha256(json.dumps([module.config[name] for name in fields]).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.numpy())
    return digest.hexdigest()
