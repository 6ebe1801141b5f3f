"""Distances between sets of images, from streaming statistics that merge across workers."""

from facm_core.metrics.frechet import FrechetStatistics, distance_with_error, self_test

__all__ = ["FrechetStatistics", "distance_with_error", "self_test"]
