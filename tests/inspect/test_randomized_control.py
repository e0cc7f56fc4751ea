import math

import numpy as np
import pytest
import torch

from weightlab.inspect import esd, randomized_control
from weightlab.inspect.randomized import _law, _marchenko_pastur_scale, _shuffled, _triangular_density


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_density_is_the_sum_of_triangles():
    values = np.sort(np.random.default_rng(0).gamma(2.0, 0.5, 200))
    points = np.linspace(0, values[-1] + 0.5, 77)
    pairs = np.maximum(1 - np.abs(points[:, None] - values) / 0.1, 0).sum(1) / (200 * 0.1)
    np.testing.assert_allclose(_triangular_density(values, points), pairs, atol=1e-11)


@pytest.mark.parametrize("Q", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("s", [0.7, 1.0])
def test_law_is_a_density_with_the_mean_of_its_scale(Q, s):
    x = np.linspace(1e-6, 6, 400_001)
    law, bottom, top = _law(x, np.array([s]), Q)
    assert np.trapezoid(law, x) == pytest.approx(1, abs=1e-4)
    power = 2 if Q == 1 else 1
    assert np.trapezoid(law * x**power, x) == pytest.approx(s**2, abs=1e-4)
    inside = x[law > 0]
    assert inside[0] == pytest.approx(max(float(bottom[0]), 1e-6), abs=1e-4)
    assert inside[-1] == pytest.approx(float(top[0]), abs=1e-4)


@pytest.mark.parametrize("shape", [(200, 200), (150, 300), (600, 150)])
def test_random_matrices_have_scale_one_and_no_traps(shape):
    control = randomized_control(3 * gaussian(*shape))
    assert control.sigma_mp == pytest.approx(1, abs=0.03)
    assert control.n_traps == 0
    assert control.distance < 0.05
    N, M = max(shape), min(shape)
    assert control.bulk_max == pytest.approx(9 * (N**0.5 + M**0.5) ** 2, rel=0.06)


def test_softrank_of_random_matrices_is_one_on_average():
    found = [randomized_control(gaussian(150, 300, seed=seed)).softrank for seed in range(8)]
    assert sum(found) / 8 == pytest.approx(1, abs=0.05)


def test_scale_moves_eigenvalues_alone():
    W = gaussian(40, 90)
    plain, scaled = randomized_control(W), randomized_control(4 * W)
    assert scaled.sigma_mp == pytest.approx(plain.sigma_mp, rel=1e-6)
    assert scaled.max_eigenvalue == pytest.approx(16 * plain.max_eigenvalue)
    assert scaled.bulk_max == pytest.approx(16 * plain.bulk_max, rel=1e-6)
    assert (scaled.n_traps, scaled.softrank) == (plain.n_traps, pytest.approx(plain.softrank))


def test_structure_goes_and_outliers_stay():
    structured = gaussian(120, 200) + 3 * gaussian(120, 1, seed=1) @ gaussian(1, 200, seed=2)
    control = randomized_control(structured)
    assert control.softrank < 0.5
    assert control.n_traps == 0
    spiked = gaussian(120, 200)
    spiked[5, 7], spiked[80, 9] = 100.0, -90.0
    assert randomized_control(spiked).n_traps == 2


def test_shuffles_keep_the_entries_of_each_slice():
    W = gaussian(20, 30, 2, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(2, 2)
    control = randomized_control(W)
    # Shuffling moves no entry between slices, so the norm of each stays, and the largest is that of the last.
    alone = esd(W[:, :, 1, 1]) / 2
    assert control.max_eigenvalue == pytest.approx(float(alone[-1]), rel=0.25)
    flattened = randomized_control(W, conv="flattened")
    assert flattened.max_eigenvalue < float(esd(W, conv="flattened")[-1])


def test_shuffles_hold_the_entries_that_were_there():
    W = torch.arange(24.0).reshape(2, 3, 2, 2)
    found = _shuffled(W, "slices", np.random.default_rng(0))
    assert not torch.equal(found, W)
    assert torch.equal(found.flatten(0, 1).sort(0).values, W.flatten(0, 1))
    assert torch.equal(
        _shuffled(W, "flattened", np.random.default_rng(0)).flatten().sort().values, W.flatten()
    )
    assert torch.equal(W.flatten(), torch.arange(24.0))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_bears_any_scale(scale):
    W = gaussian(40, 90).double()
    plain, scaled = randomized_control(W), randomized_control(scale * W)
    assert scaled.max_eigenvalue == pytest.approx(scale**2 * plain.max_eigenvalue, rel=1e-5)
    assert scaled.sigma_mp == pytest.approx(plain.sigma_mp, rel=1e-5)


def test_float32_is_near_float64():
    W = gaussian(60, 90) + 2 * gaussian(60, 1, seed=1) @ gaussian(1, 90, seed=2)
    single, double = (randomized_control(W, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single.n_traps == double.n_traps
    assert single[:5] == pytest.approx(double[:5], rel=1e-4)


def test_seed_decides():
    W = gaussian(30, 50).bfloat16()
    assert randomized_control(W) == randomized_control(W, evals=esd(W))
    assert randomized_control(W, seed=1) != randomized_control(W)
    assert randomized_control(W.mT.contiguous().mT) == randomized_control(W)


def test_zero_weight_and_no_fit():
    control = randomized_control(torch.zeros(12, 20))
    assert math.isnan(control.sigma_mp)
    assert control.n_traps == 0
    assert math.isnan(_marchenko_pastur_scale(np.array([1e-9] * 1999 + [2000.0]), 4.0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        randomized_control(torch.full((9, 9), math.nan))
