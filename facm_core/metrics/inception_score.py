"""Inception score (Salimans et al., arXiv 1606.03498) from sums that merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Self

import torch
from torch import Tensor

from facm_core.errors import require


class ScoreStatistics:
    """Count, Σ p(y|x) and Σ p log p of the classes that an extractor sees in images.

    Args:
        classes: How many there are.
    """

    def __init__(self, classes: int) -> None:
        self.count = 0
        self._probability = torch.zeros(classes, dtype=torch.float64)
        self._negative_entropy = 0.0

    def update(self, logits: Tensor) -> Self:
        """Add a batch of logits (N, classes)."""
        expected = (len(logits), len(self._probability))
        require(
            tuple(logits.shape) == expected,
            "logits.shape",
            tuple(logits.shape),
            f"expected {expected}",
            "Give one row per image, from the extractor these statistics were made for",
        )
        log_p = logits.detach().to(torch.float64).log_softmax(dim=1)
        p = log_p.exp()
        self.count += len(logits)
        self._probability += p.sum(dim=0).cpu()
        self._negative_entropy += float((p * log_p).sum())
        return self

    def merge(self, other: ScoreStatistics) -> Self:
        """Add what another instance has seen; returns self."""
        self.count += other.count
        self._probability = self._probability + other._probability
        self._negative_entropy += other._negative_entropy
        return self

    @property
    def score(self) -> float:
        """exp E KL(p(y|x) ‖ p(y)): 1 where all look alike, at most the number of classes."""
        require(self.count > 0, "count", self.count, "too few images", "Add one or more")
        marginal = self._probability / self.count
        entropy = -torch.special.xlogy(marginal, marginal).sum()
        return math.exp(self._negative_entropy / self.count + float(entropy))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state: ``count`` (), ``probability`` (classes,), ``negative_entropy`` ()."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "probability": self._probability.clone(),
            "negative_entropy": torch.tensor(self._negative_entropy, dtype=torch.float64),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> ScoreStatistics:
        """The instance that `state_dict` described."""
        statistics = cls(len(state["probability"]))
        statistics.count = int(state["count"])
        statistics._probability = state["probability"].clone()
        statistics._negative_entropy = float(state["negative_entropy"])
        return statistics


def inception_score(parts: Sequence[ScoreStatistics]) -> tuple[float, float]:
    """Mean of the scores of the parts, ten by convention, and their standard deviation."""
    scores = [part.score for part in parts]
    return fmean(scores), pstdev(scores)
