"""Kernel distance, inception score, precision and recall against torch-fidelity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from facm_core.errors import InvalidInputError
from facm_core.metrics import (
    FrechetStatistics,
    ScoreStatistics,
    inception_score,
    kernel_distance,
    precision_recall,
)


def features(seed: int, rows: int, width: int = 64, shift: float = 0.0) -> Tensor:
    """As an extractor's: float32, positive, correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return (torch.randn(rows, width, generator=generator) @ mixing + shift).relu()


GENERATED, REAL = features(1, 3000, shift=0.2), features(2, 2500)


def test_frechet_distance() -> None:
    found = [FrechetStatistics(64).update(x) for x in (GENERATED, REAL)]
    theirs = [fid_features_to_statistics(x.double()) for x in (GENERATED, REAL)]
    expected = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert found[0].distance(found[1]) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance() -> None:
    theirs = kid_features_to_metric(GENERATED.double(), REAL.double(), verbose=False)
    mean, spread = kernel_distance(GENERATED, REAL)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)
    few = kernel_distance(GENERATED[:100], REAL[:100], subset_size=100, subsets=1)
    x, y = GENERATED[:100].double().numpy(), REAL[:100].double().numpy()
    kernels = [(a @ b.T / 64 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    pairs = ~np.eye(100, dtype=bool)
    expected = kernels[0][pairs].mean() + kernels[1][pairs].mean() - 2 * kernels[2].mean()
    assert few == pytest.approx((expected, 0.0), rel=1e-12)


def test_kernel_distance_of_one_distribution_is_about_zero() -> None:
    same = kernel_distance(features(1, 3000), features(2, 3000))[0]
    assert abs(same) < 0.01 * kernel_distance(GENERATED, REAL)[0]


def test_inception_score() -> None:
    logits = 3 * features(3, 5000, width=10)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    parts = [ScoreStatistics(10).update(part) for part in logits.split(500)]
    mean, spread = inception_score(parts)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-9)


def test_inception_score_merges_and_is_kept() -> None:
    logits = 3 * features(3, 900, width=10)
    merged = ScoreStatistics(10)
    for part in logits.split(7):
        again = ScoreStatistics.from_state_dict(ScoreStatistics(10).update(part).state_dict())
        merged.merge(again)
    assert merged.count == 900
    assert merged.score == pytest.approx(ScoreStatistics(10).update(logits).score, rel=1e-12)


def test_inception_score_of_certain_and_of_equal_images() -> None:
    certain = torch.full((20, 4), -1e9).scatter(1, torch.arange(20)[:, None] % 4, 0.0)
    assert ScoreStatistics(4).update(certain).score == pytest.approx(4.0, rel=1e-12)
    equal = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])).expand(20, 4)
    assert ScoreStatistics(4).update(equal).score == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("distances", [1, 50_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_recall(distances: int, dtype: torch.dtype) -> None:
    x, y = GENERATED[:700].to(dtype), REAL[:600].to(dtype)
    theirs = prc_features_to_metric(x, y, verbose=False)
    precision, recall = precision_recall(x, y, distances=distances)
    assert precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_of_a_line() -> None:
    """Real at 0 to 4; every ball of one neighbour is 1 wide. Generated: three within, one far."""
    real = torch.arange(5.0)[:, None]
    generated = torch.tensor([[0.5], [1.5], [3.9], [9.0]])
    # Balls of the generated ones: 1, 1, 2.4 and 5.1 wide, about them; 0 to 4 are all in them.
    assert precision_recall(generated, real, neighbours=1) == (0.75, 1.0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="subset_size = 1000: not from 2 to the 9"):
        kernel_distance(features(1, 9), features(2, 2000))
    with pytest.raises(InvalidInputError, match="not two sets of rows of one width"):
        kernel_distance(features(1, 9), features(2, 9, width=8))
    with pytest.raises(InvalidInputError, match="neighbours = 3: not from 1 to less than the 3"):
        precision_recall(features(1, 3), features(2, 9))
    with pytest.raises(InvalidInputError, match="not two sets of rows of one width"):
        precision_recall(features(1, 9), features(2, 9, width=8))
    with pytest.raises(InvalidInputError, match=r"expected \(9, 10\)"):
        ScoreStatistics(10).update(torch.zeros(9, 11))
    with pytest.raises(InvalidInputError, match="too few images"):
        assert math.isnan(ScoreStatistics(10).score)
