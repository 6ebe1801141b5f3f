"""Power-function averages of the weights (EDM2, arXiv 2312.02696, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from facm_core.errors import require


def exponent_of(sigma_rel: float) -> float:
    """γ of the profile whose relative width is σ_rel (EDM2, equation 123).

    σ_rel² = (γ + 1) / ((γ + 2)²·(γ + 3)), solved for its largest root.
    """
    require(
        0 < sigma_rel < 0.28,
        "sigma_rel",
        sigma_rel,
        "outside (0, 0.28), the widths a power function can have",
        "Use e.g. 0.05 or 0.2",
    )
    inverse_variance = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse_variance, 12 - inverse_variance])
    return float(roots.real.max())


def decay(sigma_rel: float, images_seen: int, images_step: int) -> float:
    """β = (1 − Δ/n)^(γ + 1), n images seen after a step of Δ images (EDM2, equation 127)."""
    return float((1 - images_step / images_seen) ** (exponent_of(sigma_rel) + 1))


class PowerEMA:
    """Averages of a model's parameters, one per σ_rel; of those that are trained.

    Every tensor keeps the layout of its parameter, so under FSDP2 each rank averages its own
    shards and nothing is communicated.

    Attributes:
        profiles: σ_rel, written as in the recipe -> parameter name -> average.
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float]) -> None:
        for sigma_rel in sigma_rels:
            exponent_of(sigma_rel)
        self.sigma_rels = tuple(dict.fromkeys(sigma_rels))  # one twice would be updated twice
        self.profiles: dict[str, dict[str, Tensor]] = {
            str(sigma_rel): {
                name: parameter.detach().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
            for sigma_rel in sigma_rels
        }

    @torch.no_grad()
    def update(self, model: nn.Module, *, images_seen: int, images_step: int) -> None:
        """Take in the weights after a step of `images_step` images, `images_seen` in all."""
        parameters = dict(model.named_parameters())
        for sigma_rel in self.sigma_rels:
            averages = self.profiles[str(sigma_rel)]
            beta = decay(sigma_rel, images_seen, images_step)
            torch._foreach_lerp_(
                [_local(average) for average in averages.values()],
                [_local(parameters[name].detach()) for name in averages],
                1 - beta,
            )


def _local(x: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor, or the tensor itself."""
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


def synthesis_weights(
    snapshots: Sequence[tuple[int, float]], images_seen: int, sigma_rel: float
) -> NDArray[np.float64]:
    """Weights w such that Σᵢ wᵢ·snapshotᵢ comes closest to an average that was never tracked.

    Snapshot i, and the average that is wanted, are mixtures of the weights of all steps; w makes
    the least squares of the difference between these mixtures (EDM2, section 3.2, algorithm 3).

    Args:
        snapshots: Images seen and σ_rel of each, no two alike.
        images_seen: Of the average that is wanted.
        sigma_rel: Its width.

    Returns:
        A weight for each snapshot; they add up to about 1.

    Raises:
        InvalidInputError: there is no snapshot, one is taken later than the average is wanted for,
            or two are alike.
    """
    remedy = "Use snapshots of one run, up to the images wanted"
    require(bool(snapshots), "snapshots", snapshots, "there are none", remedy)
    alike = len(set(snapshots)) < len(snapshots)
    require(not alike, "snapshots", snapshots, "two are alike", remedy)
    images = np.array([count for count, _ in snapshots], np.float64)
    late = f"one is of more than images_seen = {images_seen}"
    require(bool(images.max() <= images_seen), "snapshots", snapshots, late, remedy)
    exponents = np.array([exponent_of(width) for _, width in snapshots])
    between = _overlap(images[:, None], exponents[:, None], images, exponents)
    wanted = _overlap(images, exponents, np.float64(images_seen), exponent_of(sigma_rel))
    return np.asarray(np.linalg.lstsq(between, wanted, rcond=None)[0], np.float64)


def _overlap(t_a: Any, exponent_a: Any, t_b: Any, exponent_b: Any) -> NDArray[np.float64]:
    """∫ p_a·p_b, where p(τ) = (γ + 1)·τ^γ / t^(γ + 1) on [0, t] (EDM2, equation 135)."""
    exponent = np.where(t_a < t_b, exponent_b, -exponent_a)
    scale = (exponent_a + 1) * (exponent_b + 1) / (exponent_a + exponent_b + 1)
    overlap: NDArray[np.float64] = scale * (t_a / t_b) ** exponent / np.maximum(t_a, t_b)
    return overlap
