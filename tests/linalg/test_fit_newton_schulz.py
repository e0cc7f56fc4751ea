import dataclasses
import math

import pytest
import torch

from weightlab.linalg import (
    COEFFICIENTS,
    coefficient_fit,
    fit_newton_schulz,
    gaussian_spectrum,
    newton_schulz,
    spectrum_error,
)
from weightlab.linalg.coefficients import CoefficientSet, resolve_coefficients


def outputs(chosen, s):
    for a, b, c in chosen.schedule():
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize(("m", "n"), [(2048, 2048), (512, 2048), (64, 96), (300, 301)])
def test_gaussian_spectrum_is_that_of_a_drawn_matrix(m, n):
    count = min(m, 256)
    x = torch.randn(count, count * n // m, generator=torch.Generator().manual_seed(0)).double()
    drawn = torch.linalg.svdvals(x).flip(0) / x.norm() * (count / m) ** 0.5
    law = gaussian_spectrum(m, n, count)
    assert law.square().sum() == pytest.approx(count / m, rel=1e-3)
    assert float((law - drawn).abs().max()) < 0.05 * float(law.max())


def test_gaussian_spectrum_has_the_moments_and_edges_of_the_law():
    ratio = 0.25
    scaled = gaussian_spectrum(1000, 4000).square() * 1000
    assert scaled.mean() == pytest.approx(1, rel=1e-12)
    assert scaled.square().mean() == pytest.approx(1 + ratio, rel=1e-3)
    assert scaled[0] == pytest.approx((1 - ratio**0.5) ** 2, rel=0.05)
    assert scaled[-1] == pytest.approx((1 + ratio**0.5) ** 2, rel=0.02)
    assert gaussian_spectrum(1, 1).tolist() == [1.0]


@pytest.mark.parametrize(
    ("shape", "muon", "shared"),
    [((2048, 2048), 5.1e-2, 3.6e-2), ((2048, 8192), 3.4e-2, 1.6e-4), ((512, 2048), 2.1e-2, 2.6e-5)],
)
def test_one_triple_reaches_the_known_figures(shape, muon, shared):
    s = gaussian_spectrum(*shape)
    assert spectrum_error("muon", s) == pytest.approx(muon, rel=0.05)
    fitted = fit_newton_schulz(shape, shared=True, bound=None)
    assert len(fitted.triples) == 1
    assert spectrum_error(fitted, s) == pytest.approx(shared, rel=0.06)


def test_the_known_triple_is_found():
    (triple,) = fit_newton_schulz((8192, 2048), shared=True, bound=None).triples
    assert triple == pytest.approx((2.603, -3.127, 1.568), abs=5e-3)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (256, 1024), (1, 5)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_more_freedom_fits_better_and_nothing_is_worse_than_its_start(shape, steps):
    s = gaussian_spectrum(*shape)
    one = spectrum_error(fit_newton_schulz(shape, steps=steps, shared=True), s)
    each = spectrum_error(fit_newton_schulz(shape, steps=steps), s)
    assert one <= spectrum_error("muon", s, steps) + 1e-12
    assert each <= one * 1.01 + 1e-9
    for name in ("quintic", "polar_express"):
        if steps <= 5:
            assert each <= spectrum_error(name, s, steps) + 1e-12


@pytest.mark.parametrize("shared", [True, False])
def test_minimax_has_the_lower_maximum_and_mse_the_lower_mean(shared):
    shape = (128, 192)
    s = gaussian_spectrum(*shape)
    mean = fit_newton_schulz(shape, shared=shared)
    worst = fit_newton_schulz(shape, shared=shared, objective="minimax")
    largest = [float((outputs(chosen, s) - 1).abs().max()) for chosen in (mean, worst)]
    assert largest[1] < largest[0]
    assert spectrum_error(mean, s) <= spectrum_error(worst, s)


def test_minimax_of_one_step_equioscillates():
    s = torch.linspace(0.2, 1, 400, dtype=torch.float64)
    fitted = fit_newton_schulz(spectrum=s, steps=1, objective="minimax", bound=None)
    deviation = outputs(fitted, s / s.norm()) - 1
    largest = deviation.abs().max()
    peaks = deviation[(deviation.abs() > 0.98 * largest)].sign()
    # Three parameters of an odd polynomial: four alternations.
    assert int((peaks[1:] != peaks[:-1]).sum()) >= 3


@pytest.mark.parametrize("shape", [(2048, 8192), (256, 256)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_bound_holds_where_there_is_no_spectrum(shape, shared):
    s = torch.linspace(0, 1, 4001, dtype=torch.float64)
    assert outputs(fit_newton_schulz(shape, shared=shared), s).abs().max() < 1.65
    loose = fit_newton_schulz((2048, 8192), bound=None)
    assert not outputs(loose, s).abs().max() < 1.65


def test_fits_to_a_spectrum_of_its_own():
    i = torch.arange(1, 101, dtype=torch.float64)
    spectra = torch.stack([i**-0.5, i**-0.6])
    fitted = fit_newton_schulz(spectrum=spectra * 17)
    normalised = spectra / spectra.norm(dim=1, keepdim=True)
    assert spectrum_error(fitted, normalised) < 0.1 * spectrum_error("muon", normalised)
    u, v = (torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0] for _ in range(2))
    found = torch.linalg.svdvals(newton_schulz(u * spectra[0] @ v, fitted))
    assert (found - 1).square().mean() < 0.01


def test_a_large_spectrum_is_condensed_without_losing_its_smallest_values():
    values = torch.cat([torch.full((3,), 1e-3), torch.linspace(0.5, 1, 5000)]).double()
    points, weights = coefficient_fit._condensed(values.numpy())
    assert points.size < 600
    assert weights.sum() == pytest.approx(1)
    assert points[:3] == pytest.approx([1e-3] * 3)
    assert (points * weights).sum() == pytest.approx(float(values.mean()))


def test_is_deterministic_cached_and_symmetric_in_the_shape():
    first = fit_newton_schulz((48, 80), steps=2)
    assert fit_newton_schulz((48, 80), steps=2) is first
    assert fit_newton_schulz((80, 48), steps=2) == first
    coefficient_fit._fit.cache_clear()
    assert fit_newton_schulz((48, 80), steps=2) == first
    assert "48" in first.source


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, "a shape or a spectrum"),
        ({"shape": (2, 3), "spectrum": torch.ones(2)}, ValueError, "not both"),
        ({"shape": (0, 3)}, ValueError, "at least 1"),
        ({"shape": (2, 3), "steps": 0}, ValueError, "steps"),
        ({"shape": (2, 3), "objective": "max"}, ValueError, "minimax"),
        ({"shape": (2, 3), "bound": 1.0}, ValueError, "bound"),
        ({"spectrum": torch.zeros(3)}, ValueError, "all zero"),
        ({"spectrum": torch.tensor([-1.0, 1.0])}, ValueError, "at least 0"),
        ({"spectrum": torch.tensor([math.nan])}, ValueError, "finite"),
        ({"spectrum": torch.empty(0)}, ValueError, "at least one"),
        ({"spectrum": torch.ones(3, dtype=torch.int64)}, TypeError, "int64"),
    ],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        fit_newton_schulz(**arguments)


def test_spectrum_count_is_checked():
    with pytest.raises(ValueError, match="count"):
        gaussian_spectrum(3, 4, 0)


class TestSetsThatDependOnTheShape:
    root = COEFFICIENTS["root"]

    def test_listed_shapes_have_their_own_triple_in_either_order(self):
        for shape, triples in self.root.by_shape:
            assert self.root.schedule(1, shape) == self.root.schedule(1, shape[::-1]) == triples

    def test_others_take_the_nearest_aspect_ratio(self):
        table = dict(self.root.by_shape)
        for shape, key in [
            ((64, 64), (2048, 2048)),
            ((768, 1100), (2048, 3072)),
            ((768, 2304), (2048, 8192)),
            ((100, 5000), (2048, 16384)),
        ]:
            assert self.root.schedule(1, shape) == table[key]

    def test_without_a_shape_the_general_triple_is_used(self):
        assert self.root.schedule() == COEFFICIENTS["muon"].schedule()

    def test_fitted_beats_muon_in_every_shape(self):
        for m in (64, 768, 2048):
            for aspect in (1, 1.5, 3, 4, 8):
                shape = (m, round(m * aspect))
                s = gaussian_spectrum(*shape)
                assert spectrum_error("root", s, shape=shape) < spectrum_error("muon", s)

    def test_newton_schulz_looks_the_shape_up(self):
        x = torch.randn(3, 12, 48, dtype=torch.float64)
        fixed = dataclasses.replace(self.root, triples=dict(self.root.by_shape)[(2048, 8192)], by_shape=())
        assert torch.equal(newton_schulz(x, "root"), newton_schulz(x, fixed))

    def test_a_set_of_ones_own(self):
        table = CoefficientSet(
            triples=((1.5, -0.5, 0.0),), steps=2, by_shape=(((4, 4), ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))),)
        )
        assert resolve_coefficients(table).schedule(shape=(4, 4)) == ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))
        with pytest.raises(ValueError, match="steps=3"):
            table.schedule(3, (4, 4))
