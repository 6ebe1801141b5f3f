"""What is kept of images that were looked at, and the scores that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from facm_core.metrics import (
    FrechetStatistics,
    Gaussian,
    ScoreStatistics,
    distance_with_error,
    extrapolated_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from facm_platform.evaluation.extractor import Extractor, Seen

Shown = dict[tuple[int, int], Tensor]
"""Kept images, uint8 (C, H, W), by (label or row, number among its images)."""

_SUBSET = 1000  # of the kernel distance


class Measured:
    """Sums over images, and a bounded number of their features; merges.

    Args:
        extractor: What looks at them.
        keep: Features of so many are kept, the first ones.

    Attributes:
        statistics: Of the features.
        spatial: Of the spatial features; None where the extractor has none.
        scores: Of the logits; None where it has none.
        agreeing: Images whose class, as the extractor sees it, is their label; None where it does
            not know the classes.
        features: Kept, (n, D).
        shown: Kept images.
    """

    def __init__(self, extractor: Extractor, keep: int) -> None:
        self._keep = keep
        self.statistics = FrechetStatistics(extractor.dimension)
        spatial, classes = extractor.spatial_dimension, extractor.classes
        self.spatial = None if spatial is None else FrechetStatistics(spatial)
        self.scores = None if classes is None else ScoreStatistics(classes)
        self.agreeing: int | None = None
        self.features = torch.empty(0, extractor.dimension)
        self.shown: Shown = {}

    def update(self, seen: Seen, labels: Tensor | None, shown: Shown) -> None:
        """Add a batch with these labels, None for texts, of which these images are kept."""
        self.statistics.update(seen.features)
        if self.spatial is not None and seen.spatial is not None:
            self.spatial.update(seen.spatial)
        if self.scores is not None and seen.logits is not None:
            self.scores.update(seen.logits)
        if seen.labels is not None and labels is not None:
            self.agreeing = (self.agreeing or 0) + int((seen.labels.cpu() == labels).sum())
        self._keep_features(seen.features.cpu())
        self.shown |= shown

    def merge(self, other: Measured) -> Measured:
        """Add what comes after this, in place."""
        self.statistics.merge(other.statistics)
        if self.spatial is not None and other.spatial is not None:
            self.spatial.merge(other.spatial)
        if self.scores is not None and other.scores is not None:
            self.scores.merge(other.scores)
        if other.agreeing is not None:
            self.agreeing = (self.agreeing or 0) + other.agreeing
        self._keep_features(other.features)
        self.shown |= other.shown
        return self

    @property
    def agreement(self) -> float | None:
        """Share of images seen as their label."""
        return None if self.agreeing is None else self.agreeing / self.statistics.count

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as plain tensors."""
        parts = {"statistics": self.statistics, "spatial": self.spatial, "scores": self.scores}
        state = {
            f"{name}.{key}": tensor
            for name, part in parts.items()
            if part is not None
            for key, tensor in part.state_dict().items()
        }
        agreeing = -1 if self.agreeing is None else self.agreeing
        state |= {"agreeing": torch.tensor(agreeing), "features": self.features.contiguous()}
        return state | {f"shown.{c}.{n}": image for (c, n), image in self.shown.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> Measured:
        """Become what `state_dict` described; returns self."""

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}

        self.statistics = FrechetStatistics.from_state_dict(part("statistics"))
        if self.spatial is not None:
            self.spatial = FrechetStatistics.from_state_dict(part("spatial"))
        if self.scores is not None:
            self.scores = ScoreStatistics.from_state_dict(part("scores"))
        agreeing = int(state["agreeing"])
        self.agreeing = None if agreeing < 0 else agreeing
        self.features = state["features"]
        names = {key: tuple(map(int, key.split("."))) for key in part("shown")}
        self.shown = {(c, n): state[f"shown.{key}"] for key, (c, n) in names.items()}
        return self

    def _keep_features(self, features: Tensor) -> None:
        missing = self._keep - len(self.features)
        if missing > 0:
            self.features = torch.cat([self.features.to(features.dtype), features[:missing]])


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        gaussian: Of the features.
        spatial: Of the spatial features; None where they are not known.
        features: Some of them, (n, D); None where they are not known.
        agreement: See `Measured`; None where it is not known.
        shown: Some of the images, maybe none.
        images: How many they are; 0 where it is not known.
    """

    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    agreement: float | None
    shown: Shown
    images: int = 0

    @classmethod
    def of(cls, measured: Measured) -> Reference:
        """Of real images."""
        spatial = None if measured.spatial is None else measured.spatial.gaussian
        return cls(
            measured.statistics.gaussian,
            spatial,
            measured.features,
            measured.agreement,
            measured.shown,
            measured.statistics.count,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model at one number of steps. None: the extractor or the reference does not tell.

    Attributes:
        fid: Fréchet distance to the reference, in the features of the protocol.
        fid_error: Its standard error.
        fid_infinity: That of infinitely many samples, extrapolated.
        kid: Kernel distance of the kept features.
        precision: Share of the kept samples that look real.
        recall: Share of the kept real images that could be samples.
        sfid: Fréchet distance of the spatial features.
        inception_score: Of ten parts, the mean.
        agreement: Share of samples that the extractor sees as the class asked for.
    """

    fid: float
    fid_error: float
    fid_infinity: float
    kid: float | None = None
    precision: float | None = None
    recall: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    agreement: float | None = None


def score(parts: Sequence[Measured], reference: Reference) -> Score:
    """Scores of samples.

    Args:
        parts: Of equally many samples, three or more, in their order.
        reference: What they are compared with.
    """
    statistics = [part.statistics for part in parts]
    fid, error = distance_with_error(statistics, reference.gaussian)
    optional: dict[str, float | None] = {}
    generated, real = torch.cat([part.features for part in parts]), reference.features
    if real is not None:
        generated = generated.to(torch.float64)
        real = real.to(torch.float64)
        subset = min(_SUBSET, len(generated), len(real))
        optional["kid"] = kernel_distance(generated, real, subset_size=subset)[0]
        optional["precision"], optional["recall"] = precision_recall(generated, real)
    if reference.spatial is not None:
        spatial = FrechetStatistics(len(reference.spatial.mean))
        for part in parts:
            assert part.spatial is not None
            spatial.merge(part.spatial)
        optional["sfid"] = spatial.distance(reference.spatial)
    scores = [part.scores for part in parts if part.scores is not None]
    if scores:
        optional["inception_score"] = inception_score(scores)[0]
    agreeing = [part.agreeing for part in parts if part.agreeing is not None]
    if agreeing:
        optional["agreement"] = sum(agreeing) / sum(one.count for one in statistics)
    return Score(
        fid=fid,
        fid_error=error,
        fid_infinity=extrapolated_distance(statistics, reference.gaussian),
        **optional,
    )
