"""Fréchet distance against SciPy, closed forms and the data themselves."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError
from facm_core.metrics import (
    FrechetStatistics,
    Gaussian,
    distance_with_error,
    extrapolated_distance,
    frechet,
    self_test,
)


def features(seed: int, rows: int, width: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return noise @ mixing + shift


def distance_by_scipy(x_1: Tensor, x_2: Tensor) -> float:
    mean_1, mean_2 = x_1.mean(0).numpy(), x_2.mean(0).numpy()
    cov_1, cov_2 = np.cov(x_1.numpy(), rowvar=False), np.cov(x_2.numpy(), rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_1 @ cov_2))
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root))


def distance_by_data(x_1: Tensor, x_2: Tensor) -> float:
    """No covariance at all: tr(Σ₁^½ Σ₂ Σ₁^½)^½ = ‖X₁ X₂ᵀ‖_* / √((n₁−1)(n₂−1)), X centred."""
    a, b = (x_1 - x_1.mean(0)).numpy(), (x_2 - x_2.mean(0)).numpy()
    norm = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    freedom = (len(a) - 1, len(b) - 1)
    spread = (a**2).sum() / freedom[0] + (b**2).sum() / freedom[1]
    shift = float((x_1.mean(0) - x_2.mean(0)).square().sum())
    return float(shift + spread - 2 * norm / np.sqrt(freedom[0] * freedom[1]))


def statistics(x: Tensor) -> FrechetStatistics:
    return FrechetStatistics(x.shape[1]).update(x)


@pytest.mark.parametrize(("rows", "width"), [(500, 8), (2000, 64)])
def test_equals_scipy_on_full_rank_features(rows: int, width: int) -> None:
    x_1, x_2 = features(1, rows, width), features(2, rows + 100, width, shift=0.7)
    expected = distance_by_scipy(x_1, x_2)
    assert statistics(x_1).distance(statistics(x_2)) == pytest.approx(expected, rel=1e-10)


def test_near_singular_covariances() -> None:
    x_1, x_2 = features(3, 32, 64), features(4, 32, 64, shift=0.2)
    got = statistics(x_1).distance(statistics(x_2))
    assert got == pytest.approx(distance_by_data(x_1, x_2), rel=1e-12)
    # SciPy's own root of a singular matrix is good to about √ε.
    assert got == pytest.approx(distance_by_scipy(x_1, x_2), rel=1e-5)


def test_inception_width_with_fewer_samples_than_dimensions() -> None:
    x_1, x_2 = features(5, 120, 512), features(6, 100, 512)
    got = statistics(x_1).distance(statistics(x_2))
    assert got == pytest.approx(distance_by_data(x_1, x_2), rel=1e-11)


def test_inception_width_and_500_samples() -> None:
    x_1, x_2 = features(5, 500, 2048), features(6, 500, 2048, shift=0.01)
    got = statistics(x_1).distance(statistics(x_2))
    assert got == pytest.approx(distance_by_data(x_1, x_2), rel=1e-10)


def test_closed_form_of_diagonal_gaussians() -> None:
    s_1, s_2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.5, 3.0])
    # ±√3·s in each coordinate of a 2^3 design: mean 0, unbiased variance s²·3·8/7, no correlation.
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]).double()
    factor = (8 / 7) ** 0.5
    shift = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    got = statistics(signs * s_1).distance(statistics(signs * s_2 + shift))
    expected = 5.0 + factor**2 * float((s_1 - s_2).double().square().sum())
    assert got == pytest.approx(expected, rel=1e-12)


def test_distance_to_itself_is_zero_and_symmetric() -> None:
    a, b = statistics(features(1, 100, 16)), statistics(features(2, 100, 16))
    assert a.distance(a) == pytest.approx(0.0, abs=1e-10)
    assert a.distance(b) == pytest.approx(b.distance(a), rel=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_merge_in_any_order_equals_one_pass(order: tuple[int, ...]) -> None:
    x = features(7, 1000, 24, shift=5.0)
    parts = x.split([1, 99, 400, 500])
    merged = FrechetStatistics(24)
    for index in order:
        merged.merge(statistics(parts[index]))
    whole = statistics(x)
    assert merged.count == whole.count == 1000
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    other = statistics(features(8, 300, 24))
    assert merged.distance(other) == pytest.approx(whole.distance(other), rel=1e-12)


def test_a_large_mean_does_not_cancel() -> None:
    x = features(9, 2000, 8)
    plain, shifted = FrechetStatistics(8), FrechetStatistics(8)
    for batch in x.split(64):
        plain.update(batch)
        shifted.update(batch + 1e6)
    # 1e6 keeps 1e-10 of each value; sums of raw squares would keep 1e-4 of the covariance.
    torch.testing.assert_close(shifted.covariance, plain.covariance, rtol=1e-8, atol=1e-8)


def test_the_error_is_the_spread_of_repeated_measurements() -> None:
    """Of 400 independent sets of 10 times 50 samples, against one reference."""
    reference = statistics(features(7, 4000, 3) * 1.5)
    repeats = features(8, 400 * 500, 3).reshape(400, 10, 50, 3) + 0.4
    found = [distance_with_error([statistics(x) for x in parts], reference) for parts in repeats]
    distances, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    together = statistics(repeats[0].reshape(500, 3)).distance(reference)
    assert float(distances[0]) == pytest.approx(together, rel=1e-12)
    # Both sides of it are estimates, of 4 and of 1 %.
    assert float(errors.mean()) == pytest.approx(float(distances.std()), rel=0.1)
    with pytest.raises(InvalidInputError, match="fewer than two"):
        distance_with_error([statistics(features(1, 9, 3))], reference)


def test_extrapolation_removes_the_bias_of_few_samples() -> None:
    """Of 100 sets of 1,000 samples of the reference itself, whose distance is 0."""
    reference = Gaussian(torch.zeros(16).double(), torch.eye(16).double())
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(100, 10, 100, 16, generator=generator, dtype=torch.float64)
    parts = [[statistics(part) for part in some] for some in sets]
    biased = np.mean([distance_with_error(some, reference)[0] for some in parts])
    extrapolated = [extrapolated_distance(some, reference) for some in parts]
    # Σ is off by 1/N per entry: tr (Σ^½ − 1)² is D(D + 1)/(8N)·2, and ‖μ‖² is D/N.
    assert biased == pytest.approx(16 * (1 + 17 / 4) / 1000, rel=0.02)
    error = np.std(extrapolated) / np.sqrt(len(parts))
    assert abs(np.mean(extrapolated)) < 3 * error < 0.1 * biased


def test_extrapolation_is_the_end_of_a_line() -> None:
    parts = [statistics(features(seed, 20, 3)) for seed in range(5)]
    reference = statistics(features(9, 100, 3))
    counts, distances = [60, 80, 100], []
    for count in counts:
        together = torch.cat([features(seed, 20, 3) for seed in range(count // 20)])
        distances.append(distance_by_scipy(together, features(9, 100, 3)))
    expected = np.polyfit(1 / np.array(counts), distances, 1)[1]
    assert extrapolated_distance(parts, reference) == pytest.approx(expected, rel=1e-9)


def test_state_dict_round_trip() -> None:
    whole = statistics(features(1, 50, 4))
    again = FrechetStatistics.from_state_dict(whole.state_dict())
    assert again.count == 50
    assert torch.equal(again.mean, whole.mean)
    assert torch.equal(again.covariance, whole.covariance)
    empty = FrechetStatistics.from_state_dict(FrechetStatistics(4).state_dict())
    assert empty.count == 0


def test_half_precision_features_are_summed_in_float64() -> None:
    x = features(1, 4096, 4).to(torch.bfloat16)
    torch.testing.assert_close(statistics(x).mean, x.double().mean(0), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    empty = FrechetStatistics(4)
    with pytest.raises(InvalidInputError, match=r"expected \(N, 4\)"):
        empty.update(torch.zeros(3, 5))
    with pytest.raises(InvalidInputError, match="not finite"):
        empty.update(torch.tensor([[0.0, 1.0, float("nan"), 2.0]]))
    with pytest.raises(InvalidInputError, match="expected 4"):
        empty.merge(FrechetStatistics(5))
    with pytest.raises(InvalidInputError, match="too few samples"):
        empty.distance(statistics(features(1, 9, 4)))
    assert empty.update(torch.zeros(0, 4)).count == 0
    bad, zero = -torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match="negative eigenvalue"):
        Gaussian(zero, bad).distance(Gaussian(zero, bad))
    with pytest.raises(InvalidInputError, match="fewer than three"):
        extrapolated_distance([statistics(features(1, 9, 4))] * 2, statistics(features(2, 9, 4)))


def test_self_test_notices_a_wrong_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    self_test()
    monkeypatch.setattr(frechet, "_square_root", lambda covariance: covariance)
    with pytest.raises(RuntimeError, match="self-test"):
        self_test()
