"""Two networks that share the work by time, as one velocity field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from facm_core.errors import require
from facm_core.models.base import Condition, VelocityModel, select_rows


class Experts(nn.Module):
    """A high-noise and a low-noise network, switched at a noise level, as in Wan 2.2.

    Call: ``model(x, t, condition)`` as of any velocity network. A row belongs to the high-noise
    expert if its noise 1 − t is at least `boundary` (diffusers: ``timestep >= boundary_ratio ·
    1000``); a time in (1, 2] belongs where 2 − t does.

    Sharded networks gather their weights and reduce their gradients in collective calls, while
    ranks may see different times: with ``collective = True`` every call runs both experts on every
    rank, where there is no row of theirs on one that counts for nothing.

    Args:
        high_noise: Expert of the first steps.
        low_noise: Of the others. Both read the same condition.
        boundary: Noise level in (0, 1); 0.875 in Wan 2.2's text to video.
    """

    second_time = False

    def __init__(
        self, high_noise: VelocityModel, low_noise: VelocityModel, *, boundary: float
    ) -> None:
        super().__init__()
        require(0 < boundary < 1, "boundary", boundary, "not in (0, 1)", "Use 0.875 for Wan 2.2")
        self.high_noise, self.low_noise = high_noise, low_noise
        self.boundary = boundary
        self.collective = False

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of both, so that one expert's are in pieces while the other's are at work."""
        return [*self.high_noise.blocks, *self.low_noise.blocks]

    @property
    def time_embedders(self) -> list[nn.Module]:
        """Those of both."""
        return [*self.high_noise.time_embedders, *self.low_noise.time_embedders]

    @property
    def shared_parts(self) -> list[nn.Module]:
        """Those of both."""
        return [*self.high_noise.shared_parts, *self.low_noise.shared_parts]

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, r: Tensor | None = None
    ) -> Tensor:
        """Velocity like x.

        Raises:
            ValueError: r was given.
        """
        if r is not None:
            raise ValueError("second_time = False, but r was given")
        # In the upper half of the interval, where t and 2 − t are rounded alike.
        noisy = torch.where(t > 1, t, 2 - t) - 1 >= self.boundary
        velocity, idle = torch.empty_like(x), None
        for expert, mine in ((self.high_noise, noisy), (self.low_noise, ~noisy)):
            rows = mine.nonzero().flatten()
            if len(rows):
                velocity[rows] = expert(x[rows], t[rows], select_rows(condition, rows))
            elif self.collective:
                idle = expert(x[:1], t[:1], select_rows(condition, torch.zeros_like(t[:1]).long()))
        return velocity if idle is None else velocity + 0 * idle

    def null_condition(self, condition: Condition) -> Condition:
        """The high-noise expert's, which is the other's too."""
        return self.high_noise.null_condition(condition)
