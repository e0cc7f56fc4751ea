import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import top_svd

SLOW = "ignore:top_svd.*too flat:RuntimeWarning"


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, m, n, seed=0, dtype=torch.float64):
    """A matrix with these singular values and random vectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    U = torch.linalg.qr(gaussian(m, len(values), seed=seed)).Q
    V = torch.linalg.qr(gaussian(n, len(values), seed=seed + 1)).Q
    return ((U * values) @ V.mT).to(dtype)


def power_law(k, exponent=1.0):
    return torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


def relative_error(found, W):
    true = torch.linalg.svdvals(W.double())[..., : found.S.size(-1)]
    return ((true - found.S).abs() / true).amax(-1)


def assert_triples(found, W, tol):
    """Orthonormal factors, Wᵀu = s v, descending values, signs fixed."""
    U, S, Vh, _ = found
    eye = torch.eye(S.size(-1), dtype=S.dtype).expand(*S.shape, -1)
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=tol)
    torch.testing.assert_close(Vh @ Vh.mT, eye, rtol=0, atol=tol)
    torch.testing.assert_close(W.mT @ U, Vh.mT * S.unsqueeze(-2), rtol=0, atol=tol * (1 + float(S.max())))
    assert (S.diff() <= 0).all()
    assert (S >= 0).all()
    assert (U.gather(-2, U.abs().argmax(-2, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", ["auto", "full", "randomized"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (30, 90), (1, 20), (20, 1), (1, 1), (2, 3, 24, 18)])
def test_whole_spectrum_is_that_of_a_float64_svd(method, shape):
    W, k = gaussian(*shape), min(shape[-2:])
    found = top_svd(W, k, method)
    assert_triples(found, W, 1e-11)
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close((found.U * found.S.unsqueeze(-2)) @ found.Vh, W, rtol=0, atol=1e-11)
    assert found.certificate.passed.all()
    torch.testing.assert_close(found.certificate.energy, torch.ones(shape[:-2], dtype=W.dtype))
    torch.testing.assert_close(
        found.certificate.outside, torch.zeros(shape[:-2], dtype=W.dtype), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize(("m", "n"), [(400, 400), (600, 300), (300, 600)])
def test_randomized_is_within_its_tolerance_and_tells_the_rest(m, n):
    W = with_spectrum(power_law(300), m, n)
    found = top_svd(W, 12)
    assert not found.certificate.exact
    assert found.certificate.passed
    assert_triples(found, W, 1e-11)
    assert relative_error(found, W) < 1e-4
    assert found.certificate.outside == pytest.approx(1 / 13, rel=1e-3)
    share = (power_law(12) ** 2).sum() / (power_law(300) ** 2).sum()
    assert found.certificate.energy == pytest.approx(float(share), rel=1e-4)
    residual = torch.linalg.vector_norm(W @ found.Vh.mT - found.U * found.S, dim=0).max() / found.S[0]
    torch.testing.assert_close(found.certificate.residual, residual, rtol=1e-6, atol=1e-12)


def test_best_approximation_leaves_the_tail():
    W = with_spectrum(0.9 ** torch.arange(300), 300, 320)
    U, S, Vh, certificate = top_svd(W, 20, tol=1e-10)
    rest = W - (U * S) @ Vh
    torch.testing.assert_close(
        rest.square().sum(), (torch.linalg.svdvals(W)[20:] ** 2).sum(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(certificate.outside, torch.linalg.matrix_norm(rest, 2), rtol=1e-3, atol=0)


@pytest.mark.filterwarnings(SLOW)
@given(
    kind=st.sampled_from(["power", "geometric", "step", "gaussian", "clusters"]),
    steepness=st.floats(0.05, 2.0),
    r=st.integers(1, 24),
    oversampling=st.integers(0, 24),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_what_passes_is_within_the_tolerance_and_what_does_not_says_how_far(
    kind, steepness, r, oversampling, iterations, seed
):
    k = 96
    index = torch.arange(k)
    values = {
        "power": power_law(k, steepness),
        "geometric": torch.exp(-0.3 * steepness * index),
        "step": torch.where(index < 12, 1.0, 0.5 / (1 + steepness)),
        "gaussian": torch.linalg.svdvals(gaussian(k, k, seed=seed)),
        "clusters": torch.exp(-steepness * (index // 8)),
    }[kind]
    W = with_spectrum(values, 120, k, seed)
    found = top_svd(W, r, "randomized", tol=1e-3, oversampling=oversampling, iterations=iterations)
    true = torch.linalg.svdvals(W)[:r]
    # Values from a subspace never exceed the true ones, and those below rounding are not told apart.
    assert (true + 1e-13 * true[0] >= found.S).all()
    real = true > 1e-12 * true[0]
    error = float(torch.where(real, (true - found.S) / true, 0).max())
    if found.certificate.passed:
        assert error <= 1.5e-3
    assert error <= max(2 * float(found.certificate.error), 1e-12)


def test_a_flat_spectrum_is_called_flat():
    W = with_spectrum(torch.linspace(1, 0.9, 300), 300, 300)
    with pytest.warns(RuntimeWarning, match="too flat around singular value 8 for 5 iterations"):
        found = top_svd(W, 8, "randomized", iterations=5)
    assert not found.certificate.passed
    assert found.certificate.error > 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallen_back = top_svd(W, 8)
    assert fallen_back.certificate.exact
    assert fallen_back.certificate.passed
    assert relative_error(fallen_back, W) < 1e-12


def test_equal_values_are_right_and_said_not_to_end_at_r():
    W = with_spectrum(torch.ones(300), 300, 300)
    found = top_svd(W, 8)
    assert_triples(found, W, 1e-11)
    torch.testing.assert_close(found.S, torch.ones(8, dtype=W.dtype))
    torch.testing.assert_close(found.certificate.outside, found.S[-1])


def test_auto_decomposes_small_or_nearly_whole_matrices_fully():
    assert top_svd(gaussian(200, 500), 4).certificate.exact
    assert top_svd(with_spectrum(power_law(300, 3), 300, 300), 200).certificate.exact


def test_rank_below_r_leaves_zeros_and_orthonormal_vectors():
    for method in ("full", "randomized", "auto"):
        for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            W = with_spectrum([3.0, 2.0, 1.0], 300, 280, dtype=dtype)
            found = top_svd(W, 6, method)
            assert_triples(found, W, tol)
            torch.testing.assert_close(
                found.S[:3], torch.tensor([3.0, 2.0, 1.0], dtype=dtype), rtol=tol, atol=0
            )
            assert (found.S[3:] < tol).all()
            assert found.certificate.passed
            assert found.certificate.energy == pytest.approx(1)


@pytest.mark.parametrize("method", ["full", "randomized", "auto"])
def test_zeros_have_zero_values(method):
    found = top_svd(torch.zeros(300, 290), 3, method)
    assert_triples(found, torch.zeros(300, 290), 1e-6)
    assert (found.S == 0).all()
    assert found.certificate.passed
    assert found.certificate.energy == 1
    assert found.certificate.outside == 0
    assert found.certificate.residual == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype):
    W = with_spectrum(power_law(300), 300, 300, dtype=dtype)
    found, wide = top_svd(W, 5), top_svd(W.float(), 5)
    assert found.S.dtype == torch.float32
    for mine, theirs in zip(found[:3], wide[:3], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_goes_through(scale):
    W = with_spectrum(power_law(300), 300, 300, dtype=torch.float32)
    plain, scaled = top_svd(W, 5), top_svd(W * scale, 5)
    assert not scaled.certificate.exact
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.certificate.energy, plain.certificate.energy)


def test_strides_seed_and_batch_change_nothing():
    W = with_spectrum(power_law(300), 300, 320, dtype=torch.float32)
    other = with_spectrum(power_law(300, 1.5), 300, 320, seed=5, dtype=torch.float32)
    state = torch.get_rng_state()
    first = top_svd(W, 7)
    assert torch.equal(state, torch.get_rng_state())
    wide = torch.empty(300, 640)
    wide[:, ::2] = W
    for again in (top_svd(W, 7), top_svd(wide[:, ::2], 7)):
        assert all(map(torch.equal, first[:3], again[:3]))
    batch = top_svd(torch.stack([other, W]), 7)
    assert all(torch.equal(mine, theirs[1]) for mine, theirs in zip(first[:3], batch[:3], strict=True))
    assert batch.certificate.error.shape == (2,)
    drawn = [top_svd(W, 7, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0].U, drawn[1].U)
    assert not torch.equal(drawn[0].U, drawn[2].U)
    torch.testing.assert_close(drawn[0].S, drawn[2].S, rtol=2e-4, atol=0)


def test_transposing_swaps_the_vectors():
    W = with_spectrum(power_law(40), 40, 60)
    (U, S, Vh, _), (U2, S2, Vh2, _) = top_svd(W, 6), top_svd(W.mT, 6)
    torch.testing.assert_close(S, S2)
    torch.testing.assert_close((U * S) @ Vh, ((U2 * S2) @ Vh2).mT)


def test_no_gradient_and_the_input_is_kept():
    W = gaussian(30, 20).requires_grad_()
    before = W.detach().clone()
    assert not any(t.requires_grad for t in top_svd(W, 3)[:3])
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    ("W", "r", "options", "error", "message"),
    [
        (
            torch.ones(4, 3, dtype=torch.int64),
            1,
            {},
            TypeError,
            "real floating-point tensor, got torch.int64",
        ),
        (torch.ones(4, 3, dtype=torch.complex64), 1, {}, TypeError, "got torch.complex64"),
        (torch.ones(4), 1, {}, ValueError, r"matrices of shape \(\.\.\., m, n\), got \(4,\)"),
        (torch.ones(0, 3), 1, {}, ValueError, r"at least one entry, got shape \(0, 3\)"),
        (torch.ones(4, 3, device="meta"), 1, {}, ValueError, "meta device; load the weights first"),
        (torch.ones(4, 3), 0, {}, ValueError, r"r must be in 1\.\.3 for shape \(4, 3\), got 0"),
        (torch.ones(4, 3), 4, {}, ValueError, r"r must be in 1\.\.3 for shape \(4, 3\), got 4"),
        (
            torch.ones(4, 3),
            1,
            {"method": "fast"},
            ValueError,
            'must be "auto", "full" or "randomized", got \'fast\'',
        ),
        (torch.ones(4, 3), 1, {"tol": 0.0}, ValueError, "tol must be above 0, got 0.0"),
        (torch.ones(4, 3), 1, {"tol": float("nan")}, ValueError, "tol must be above 0, got nan"),
        (torch.ones(4, 3), 1, {"oversampling": -1}, ValueError, "oversampling must be at least 0, got -1"),
        (torch.ones(4, 3), 1, {"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        (torch.tensor([[1.0, float("nan")]]), 1, {}, ValueError, "W holds NaN or infinity"),
        (torch.tensor([[1.0, float("inf")]]), 1, {}, ValueError, "W holds NaN or infinity"),
    ],
)
def test_bad_input_is_named(W, r, options, error, message):
    with pytest.raises(error, match=message):
        top_svd(W, r, **options)
