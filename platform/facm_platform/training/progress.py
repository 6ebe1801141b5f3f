"""Averages of the metrics between two log points, and the line on the terminal."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from facm_platform.progress import time_left
from facm_platform.training.parallel import mean_over_workers


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
