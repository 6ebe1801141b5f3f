"""Per-channel mean and variance in float64, in one pass over pieces that merge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from facm_core.errors import require

Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelStatistics:
    """Count, mean and sum of squared deviations (M2) of every channel.

    Attributes:
        count: Values seen per channel.
        mean: (C,) float64.
        m2: (C,) float64, sum of (value - mean)^2.
    """

    count: int
    mean: Float64
    m2: Float64

    @staticmethod
    def empty(channels: int) -> ChannelStatistics:
        """Of no values at all."""
        return ChannelStatistics(count=0, mean=np.zeros(channels), m2=np.zeros(channels))

    @staticmethod
    def of(latents: NDArray[np.generic], moments: bool = False) -> ChannelStatistics:
        """Of latents (B, C, H, W), of any float type, B > 0.

        Args:
            latents: Latents; or, for `moments`, their means and log-variances (B, 2C, H, W).
            moments: The expectation over all draws, by the law of total variance.
        """
        values = latents.astype(np.float64)
        within: Float64 | float = 0.0
        if moments:
            values, log_variance = np.split(values, 2, axis=1)
            within = np.exp(log_variance).sum(axis=(0, 2, 3))
        mean = values.mean(axis=(0, 2, 3))
        deviations = values - mean[:, None, None]
        # The second term is what rounding left in the mean (Chan, Golub and LeVeque 1983).
        residue = deviations.sum(axis=(0, 2, 3))
        count = values.size // values.shape[1]
        m2 = np.square(deviations).sum(axis=(0, 2, 3)) - residue**2 / count + within
        return ChannelStatistics(count=count, mean=mean, m2=m2)

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Of the values of both (Chan's pairwise update)."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return ChannelStatistics(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
        )

    def std(self) -> Float64:
        """Population standard deviation of every channel, (C,) float64.

        Raises:
            InvalidInputError: no values, or a constant channel, which cannot be normalised.
        """
        require(self.count > 0, "rows", 0, "there are no latents", "Encode at least one image")
        std = np.sqrt(self.m2 / self.count)
        constant = np.flatnonzero(~(std > 0)).tolist()
        require(
            not constant,
            "std",
            std.tolist(),
            f"channels {constant} hold one constant and cannot be normalised",
            "Encode more images, or drop these channels",
        )
        return std
