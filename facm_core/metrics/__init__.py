"""Distances between sets of images, from streaming statistics that merge across workers."""

from facm_core.metrics.frechet import FrechetStatistics, self_test

__all__ = ["FrechetStatistics", "self_test"]
