"""Averages of the metrics between two log points, and the line on the terminal."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from facm_platform.progress import time_left
from facm_platform.training.parallel import mean_over_workers

# Asking is a collective of some milliseconds; machines are taken away two minutes after notice.
_LOOK_SECONDS = 5.0


class Notices(NamedTuple):
    """What the clock of one rank tells all of them.

    Attributes:
        look_around: It is time to ask whether a machine is to go.
        time_is_up: The run is to end.
    """

    look_around: bool = False
    time_is_up: bool = False


class Clock:
    """Begins with its making.

    Args:
        max_hours: When time is up; None for never.
    """

    def __init__(self, max_hours: float | None) -> None:
        self._end = time.monotonic() + (math.inf if max_hours is None else 3600 * max_hours)
        self._looked = time.monotonic()

    def notices(self) -> Notices:
        """As of now."""
        now = time.monotonic()
        look = now - self._looked > _LOOK_SECONDS
        if look:
            self._looked = now
        return Notices(look, now > self._end)


class MetricWindow:
    """Sums metrics on the device, so that steps do not wait for numbers nobody reads yet."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.steps = 0
        self._images = 0
        self._started = time.perf_counter()

    def add(self, metrics: dict[str, Tensor], images: int) -> None:
        """Take in one step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self.steps += 1
        self._images += images

    def close(self) -> dict[str, float]:
        """Means over the window's steps and over the workers, and images/s. A collective."""
        sums = torch.stack([value.double() for value in self._sums.values()])
        means = (mean_over_workers(sums) / self.steps).tolist()
        seconds = time.perf_counter() - self._started
        values = dict(zip(self._sums, means, strict=True))
        return values | {"images_per_second": self._images / seconds}


def progress_line(job: str, images_seen: int, total_images: int, metrics: dict[str, float]) -> str:
    """One line: share done, loss, speed, time left."""
    speed = metrics["images_per_second"]
    return (
        f"{job} {images_seen / total_images:4.0%}  {images_seen:,}/{total_images:,} images  "
        f"loss {metrics['loss']:.4f}  {speed:,.0f} images/s  "
        f"{time_left(images_seen, total_images, speed)}"
    )
