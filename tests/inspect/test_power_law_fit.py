import math

import pytest
import torch

from weightlab.inspect import esd, fit_power_law
from weightlab.linalg import power_law_scan


def quantiles(alpha, n, xmin=1.0):
    return xmin * (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / (alpha - 1))


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reports_the_first_least_distance():
    evals = esd(gaussian(60, 90))
    fit, scan = fit_power_law(evals), power_law_scan(evals)
    best = int(scan.ks.argmin())
    assert fit.status == "ok"
    assert (fit.alpha, fit.ks) == (float(scan.alphas[best]), float(scan.ks[best]))
    assert (fit.xmin, fit.xmax) == (float(evals[best]), float(evals[-1]))
    assert fit.n_tail == 60 - best
    assert fit.sigma == pytest.approx((fit.alpha - 1) / math.sqrt(60 - best))
    assert torch.equal(fit.ks_all, scan.ks)


def test_order_and_type_do_not_matter():
    evals = quantiles(2.5, 150)
    shuffled = evals[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    fit = fit_power_law(evals)
    assert fit_power_law(shuffled) == fit
    assert abs(fit.alpha - 2.5) < 0.01
    assert fit_power_law(evals.float()).alpha == pytest.approx(fit.alpha, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 3.0, 1e4])
def test_scale_leaves_exponent_and_count(scale):
    evals = esd(gaussian(40, 80))
    plain, scaled = fit_power_law(evals), fit_power_law(evals * scale)
    assert scaled.alpha == pytest.approx(plain.alpha, rel=1e-9)
    assert scaled.ks == pytest.approx(plain.ks, rel=1e-9)
    assert scaled.xmin == pytest.approx(plain.xmin * scale, rel=1e-12)
    assert scaled.n_tail == plain.n_tail


def test_small_eigenvalues_are_left_out():
    evals = quantiles(2.5, 50)
    padded = torch.cat(
        [torch.zeros(9, dtype=torch.float64), torch.full((4,), 1e-5, dtype=torch.float64), evals]
    )
    assert fit_power_law(padded) == fit_power_law(evals)
    assert len(fit_power_law(padded, threshold=0).ks_all) == len(fit_power_law(evals).ks_all) + 4


def test_start_that_was_asked_for():
    evals = quantiles(3.0, 200)
    fit = fit_power_law(evals, xmin=2.0)
    tail = evals[evals >= 2.0]
    assert fit.xmin == 2.0
    assert fit.n_tail == len(tail)
    assert fit.alpha == pytest.approx(1 + len(tail) / float((tail / tail[0]).log().sum()), rel=1e-9)


def test_small_samples_have_their_own_rule():
    evals = quantiles(2.5, 12)
    corrected, plain = fit_power_law(evals), fit_power_law(evals, small_n="plain")
    assert corrected.n_tail >= 8
    full = 1 + 11 / float((evals / evals[0]).log().sum())
    assert float(corrected.alphas[0]) == pytest.approx(full, rel=1e-12)
    assert float(plain.alphas[0]) - 1 == pytest.approx((full - 1) * 12 / 11, rel=1e-12)


def test_what_cannot_be_fitted_says_so():
    for evals, status in [
        (torch.zeros(10), "too few"),
        (torch.tensor([0.0, 3.0]), "too few"),
        (torch.empty(0), "too few"),
        (torch.ones(30), "degenerate"),
        (torch.ones(5), "degenerate"),
    ]:
        fit = fit_power_law(evals)
        assert fit.status == status
        assert math.isnan(fit.alpha)
        assert math.isnan(fit.sigma)
        assert fit.n_tail == 0
    assert fit_power_law(quantiles(2.0, 9), xmin=1e9).status == "too few"


def test_equal_eigenvalues_at_the_start_of_the_tail_are_all_counted():
    evals = torch.cat([torch.ones(20, dtype=torch.float64), quantiles(2.2, 60, xmin=5.0)])
    fit = fit_power_law(evals)
    assert fit.n_tail == int((evals >= fit.xmin).sum())


@pytest.mark.parametrize(
    ("evals", "options", "message"),
    [
        (torch.ones(2, 2), {}, r"shape \(2, 2\)"),
        (torch.tensor([1.0, math.nan]), {}, "NaN"),
        (torch.tensor([1.0, math.inf]), {}, "infinity"),
        (torch.tensor([1.0, -1.0]), {}, "negative"),
        (torch.ones(3), {"threshold": -1.0}, "threshold must be at least 0"),
        (torch.ones(3), {"xmin": 0.0}, "xmin must be above 0"),
        (torch.ones(3), {"small_n": "no"}, "small_n must be"),
    ],
)
def test_bad_input(evals, options, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(evals, **options)
