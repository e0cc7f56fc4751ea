"""The ways of evaluating the polynomials agree with one another and with float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import COEFFICIENTS, newton_schulz, newton_schulz_foreach
from weightlab.linalg.sign_method import (
    METHODS,
    choose_method,
    gram_segment_length,
    gram_segments,
    method_cost,
)

CPU = torch.device("cpu")
MUON = COEFFICIENTS["muon"].schedule()
FIVE_STEPS = ("muon", "quintic", "polar_express", "cans", "root")
SPECTRA = {
    "flat": lambda i: torch.ones_like(i),
    "1/sqrt": lambda i: i**-0.5,
    "1/i": lambda i: 1 / i,
    "1/i^2": lambda i: i**-2.0,
    "spike": lambda i: torch.where(i == 1, 30.0, 1.0),
    "low rank": lambda i: torch.where(i <= 4, 1.0, 1e-3),
    "half": lambda i: torch.where(i <= i.numel() / 2, 1.0, 0.1),
}


def matrix(m, n, spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, dtype=torch.float64, generator=generator)
    if spectrum == "Gaussian":
        return x
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u * SPECTRA[spectrum](torch.arange(1, min(m, n) + 1, dtype=torch.float64)) @ vh


def exact(x, name, steps=None):
    """The polynomials on the singular values of a float64 SVD."""
    chosen = COEFFICIENTS[name]
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() * chosen.safety)
    for a, b, c in chosen.schedule(steps, (x.size(0), x.size(1))):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(24, 24), (20, 50), (50, 20)])
def test_every_method_is_the_polynomial_of_the_singular_values(method, name, shape):
    x = matrix(*shape, "Gaussian")
    assert error(newton_schulz(x, name, method=method, eps=1e-30), exact(x, name)) < 1e-10


@pytest.mark.parametrize("spectrum", ["Gaussian", *SPECTRA])
@pytest.mark.parametrize("shape", [(96, 96), (96, 256)])
def test_float32_errors_stay_below_what_is_stated(spectrum, shape):
    x = matrix(*shape, spectrum)
    for name in FIVE_STEPS:
        expected = exact(x, name)
        for method in METHODS:
            assert error(newton_schulz(x.float(), name, method=method), expected) < 1e-4, (name, method)


@pytest.mark.parametrize("spectrum", ["Gaussian", *SPECTRA])
@pytest.mark.parametrize("shape", [(128, 128), (128, 384)])
@pytest.mark.parametrize("batched", [False, True])
def test_bfloat16_errors_of_the_gram_form_stay_below_what_is_stated(spectrum, shape, batched):
    x = matrix(*shape, spectrum)
    stack = x.expand(2, *shape) if batched else x
    for name in FIVE_STEPS:
        expected = exact(x, name)
        direct, form = (
            error(
                newton_schulz(stack, name, dtype=torch.bfloat16, method=method).view(-1, *shape)[0], expected
            )
            for method in ("direct", "gram")
        )
        assert form < max(4 * direct, 0.12), name
        if spectrum == "Gaussian" and shape[1] >= 2 * shape[0]:
            assert form < 1.2 * direct, name


def test_symmetric_steps_round_like_direct_ones_in_bfloat16():
    x = matrix(64, 160, "Gaussian").bfloat16()
    plain, symmetric = (newton_schulz(x, method=method).float() for method in ("direct", "symmetric"))
    expected = exact(x.double(), "muon")
    assert error(symmetric, expected) < 1.2 * error(plain, expected)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    name=st.sampled_from(sorted(COEFFICIENTS)),
    method=st.sampled_from(METHODS),
    exponent=st.integers(-6, 8),
    seed=st.integers(0, 2**16),
)
def test_symmetries(m, n, name, method, exponent, seed):
    x = matrix(m, n, "Gaussian", seed)
    sign = functools.partial(newton_schulz, coefficients=name, eps=1e-30, method=method)
    y = sign(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
    close(sign(x.mT), y.mT)
    close(sign(x * 10.0**exponent), y)
    q = torch.linalg.qr(matrix(m, m, "Gaussian", seed + 1))[0]
    close(sign(q @ x), q @ y)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 24, 60), (2, 2, 33, 17)])
def test_batch_equals_one_at_a_time(method, dtype, shape):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.stack([newton_schulz(m, method=method) for m in x.flatten(0, -3)]).view(shape)
    torch.testing.assert_close(newton_schulz(x, method=method), one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_bad_matrices_do_not_spread(method, dtype):
    x = torch.randn(4, 32, 40, generator=torch.Generator().manual_seed(0))
    clean = newton_schulz(x, dtype=dtype, method=method)
    x[0] = 0
    x[1, 2, 2] = float("nan")
    x[2, 0, 0] = float("inf")
    y = newton_schulz(x, dtype=dtype, method=method)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert torch.equal(y[3], clean[3])
    for i in range(3):
        torch.testing.assert_close(
            newton_schulz(x[i], dtype=dtype, method=method), y[i], equal_nan=True, rtol=0, atol=0
        )


@pytest.mark.parametrize("method", [*METHODS, "auto"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 1, 5)])
def test_one_row(method, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    s = torch.tensor(1.0).double()
    for a, b, c in MUON:
        s = a * s + b * s**3 + c * s**5
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(newton_schulz(x, eps=1e-30, method=method), s * x / norm)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (0, 3, 3)])
def test_empty(method, shape):
    assert newton_schulz(torch.empty(shape), method=method).shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 9)])
def test_compiles_without_graph_breaks(method, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    call = functools.partial(newton_schulz, method=method, dtype="auto")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    # float32 where bfloat16 is not native, else bfloat16 in another order.
    torch.testing.assert_close(compiled(x), call(x), rtol=0, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    x = matrix(3, 4, "Gaussian").requires_grad_()
    assert torch.autograd.gradcheck(lambda t: newton_schulz(t, steps=2, method=method), (x,))


def test_large_matrices_of_a_batch_are_done_one_at_a_time_with_the_same_result():
    x = torch.randn(2, 512, 520, generator=torch.Generator().manual_seed(0))
    y = newton_schulz(x, steps=1)
    assert torch.equal(y[1], newton_schulz(x[1], steps=1))
    torch.testing.assert_close(y, newton_schulz(x, steps=1, method="direct"), rtol=1e-4, atol=1e-6)


def test_auto_dtype_keeps_float64_and_returns_the_type_given():
    x = matrix(8, 12, "Gaussian")
    assert torch.equal(newton_schulz(x, dtype="auto"), newton_schulz(x))
    half = newton_schulz(x.half(), dtype="auto")
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), newton_schulz(x), rtol=0, atol=0.05)


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 24)), min_size=0, max_size=8),
    name=st.sampled_from(["root", "polar_express"]),
    waste=st.sampled_from([0.0, 0.2, 0.7]),
    seed=st.integers(0, 2**16),
)
def test_foreach_equals_one_at_a_time(shapes, name, waste, seed):
    matrices = [matrix(m, n, "Gaussian", seed + i) for i, (m, n) in enumerate(shapes)]
    found = newton_schulz_foreach(matrices, name, waste=waste)
    assert len(found) == len(matrices)
    for x, y in zip(matrices, found, strict=True):
        torch.testing.assert_close(y, newton_schulz(x, name), rtol=1e-8, atol=1e-9)


def test_foreach_takes_mixed_types():
    a, b = torch.randn(4, 6), torch.randn(6, 4).bfloat16()
    A, B = newton_schulz_foreach([a, b])
    assert (A.dtype, B.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(B, newton_schulz(b))


@pytest.mark.parametrize(
    ("call", "error_type", "words"),
    [
        (lambda: newton_schulz(torch.ones(2, 3), method="fast"), ValueError, "fast.*direct, symmetric, gram"),
        (lambda: newton_schulz_foreach([torch.ones(2, 3, 4)]), ValueError, r"\(2, 3, 4\)"),
        (lambda: newton_schulz_foreach([torch.ones(2, 3).long()]), TypeError, "int64"),
        (lambda: newton_schulz_foreach([torch.ones(2, 3)], waste=1.0), ValueError, "waste"),
        (lambda: newton_schulz_foreach([], "moun"), ValueError, "moun.*root"),
    ],
)
def test_bad_input(call, error_type, words):
    with pytest.raises(error_type, match=words):
        call()


@pytest.mark.parametrize(("m", "n"), [(1024, 1024), (2048, 8192)])
def test_costs_count_the_flops_of_the_formulas(m, n, monkeypatch):
    monkeypatch.setattr("weightlab.linalg.symmetric_products.relative_cost", lambda *args: 0.5)
    cost = functools.partial(method_cost, m=m, n=n, schedule=MUON, dtype=torch.float64, device=CPU)
    assert cost("direct") == pytest.approx(5 * (4 * m**2 * n + 2 * m**3), rel=0.01)
    assert cost("symmetric") == pytest.approx(5 * (3 * m**2 * n + m**3), rel=0.04)
    assert cost("gram") == pytest.approx(3 * m**2 * n + 17 * m**3, rel=0.15)


def test_the_cheapest_method_is_chosen():
    for m, n in [(16, 16), (512, 512), (512, 4096), (64, 8192)]:
        costs = {name: method_cost(name, m, n, MUON, torch.float32, CPU) for name in METHODS}
        assert costs[choose_method(m, n, MUON, torch.float32, CPU)] == min(costs.values())
    assert choose_method(1024, 8192, MUON, torch.float32, CPU) == "gram"
    assert choose_method(1024, 1024, MUON, torch.float32, CPU) == "symmetric"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_segments_cover_the_schedule(dtype, name):
    schedule = COEFFICIENTS[name].schedule()
    segments = list(gram_segments(schedule, dtype))
    assert tuple(t for s in segments for t in s) == schedule
    assert all(1 <= len(s) <= 5 for s in segments)


def test_segments_are_short_where_rounding_would_grow():
    steep = [(8.0, -20.0, 15.0)] * 5
    assert gram_segment_length(steep, torch.float32) < gram_segment_length(MUON, torch.float32)
    assert gram_segment_length(steep, torch.float64) == 5
    assert gram_segment_length(steep, torch.bfloat16) == 1
    assert [gram_segment_length(MUON, torch.float32, spread) for spread in (1.0, 100.0)] == [5, 3]
    lengths = [gram_segment_length(MUON, torch.bfloat16, spread) for spread in (0.1, 1.0, 10.0, float("nan"))]
    assert lengths == [5, 3, 2, 2]
