"""Averages of the metrics between two log points, and the line on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from facm_platform.progress import time_left
from facm_platform.training.parallel import mean_over_workers

TIME_BINS = 8
IDLE_SHARES = ("data_wait_share", "checkpoint_share")
"""Metrics: of a window's time, what a worker spent waiting for data, and on checkpoints."""

_COUNT = "count"

# Asking is a collective of some milliseconds; machines are taken away two minutes after notice.
_LOOK_SECONDS = 5.0


class Notices(NamedTuple):
    """What one rank tells all of them.

    Attributes:
        look_around: It is time to ask whether a machine is to go.
        time_is_up: The run is to end.
        good_enough: The same, because of its FID.
    """

    look_around: bool = False
    time_is_up: bool = False
    good_enough: bool = False


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
        self._bins: dict[str, Tensor] = {}
        self.steps = 0
        self._images = 0
        self._started = time.perf_counter()
        self._idle = dict.fromkeys(IDLE_SHARES, 0.0)

    @contextmanager
    def idle(self, share: str) -> Iterator[None]:
        """The time of the block is spent without work, and counts for one of `IDLE_SHARES`."""
        started = time.perf_counter()
        yield
        self._idle[share] += time.perf_counter() - started

    def add(self, metrics: dict[str, Tensor], images: int) -> None:
        """Take in one step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self.steps += 1
        self._images += images

    def add_rows(self, rows: dict[str, Tensor]) -> None:
        """Take in values of single rows, to be averaged by their time ``t``."""
        values = dict(rows)
        bins = (values.pop("t") * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        for name, value in {**values, _COUNT: torch.ones_like(bins)}.items():
            if name not in self._bins:
                self._bins[name] = torch.zeros(TIME_BINS, dtype=torch.float64, device=bins.device)
            self._bins[name].index_add_(0, bins, value.double())

    def close(self) -> dict[str, float]:
        """Means over the window's steps and over the workers, and images/s. A collective."""
        seconds = time.perf_counter() - self._started
        sums = {name: value.double() for name, value in self._sums.items()}
        some = next(iter(sums.values()))
        sums |= {k: some.new_tensor(self.steps * idle / seconds) for k, idle in self._idle.items()}
        means = (mean_over_workers(torch.stack([*sums.values()])) / self.steps).tolist()
        values = dict(zip(sums, means, strict=True))
        return values | self._by_time() | {"images_per_second": self._images / seconds}

    def _by_time(self) -> dict[str, float]:
        """``name/t0`` is the mean over the rows of the window with t in the first bin of [0, 1]."""
        if not self._bins:
            return {}
        bins = dict(
            zip(self._bins, mean_over_workers(torch.stack([*self._bins.values()])), strict=True)
        )
        count = bins.pop(_COUNT)
        return {
            f"{name}/t{index}": float(total[index] / count[index])
            for name, total in bins.items()
            for index in range(TIME_BINS)
            if count[index]
        }


def progress_line(job: str, images_seen: int, total_images: int, metrics: dict[str, float]) -> str:
    """One line: share done, loss, speed, time left."""
    speed = metrics["images_per_second"]
    return (
        f"{job} {images_seen / total_images:4.0%}  {images_seen:,}/{total_images:,} images  "
        f"loss {metrics['loss']:.4f}  {speed:,.0f} images/s  "
        f"{time_left(images_seen, total_images, speed)}"
    )
