"""Distances between sets of images, and scores of them, from features.

What grows with the number of images streams: statistics that merge across workers. Kernel distance
and precision take features themselves, of as many images as one wants to keep.
"""

from facm_core.metrics.frechet import (
    FrechetStatistics,
    Gaussian,
    distance_with_error,
    extrapolated_distance,
    self_test,
)
from facm_core.metrics.inception_score import ScoreStatistics, inception_score
from facm_core.metrics.kernel import kernel_distance
from facm_core.metrics.precision_recall import precision_recall

__all__ = [
    "FrechetStatistics",
    "Gaussian",
    "ScoreStatistics",
    "distance_with_error",
    "extrapolated_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "self_test",
]
