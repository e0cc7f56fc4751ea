import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import COEFFICIENTS, newton_schulz, orthogonality_error
from weightlab.linalg.coefficients import resolve_coefficients

NAMES = sorted(COEFFICIENTS)


def polynomial(s, name, steps=None, shape=None):
    """The chain of polynomials on scalars, written out."""
    for a, b, c in COEFFICIENTS[name].schedule(steps, shape):
        s = a * s + b * s**3 + c * s**5
    return s


def orthogonal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_acts_on_singular_values_only(name, shape):
    m, n = shape
    k = min(shape)
    values = torch.linspace(0.5, 2.0, k, dtype=torch.float64)
    u, v = orthogonal(m, 0)[:, :k], orthogonal(n, 1)[:, :k]
    scaled = values / (values.norm() * COEFFICIENTS[name].safety)
    expected = u @ torch.diag(polynomial(scaled, name, shape=shape)) @ v.T
    got = newton_schulz(u @ torch.diag(values) @ v.T, name, eps=1e-30)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["classic", "cubic"])
def test_convergent_sets_reach_the_polar_factor(name):
    x = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(newton_schulz(x, name), u @ vh, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "polar_express", "cans", "quintic"])
def test_optimizer_sets_bring_wide_gaussians_near_one(name):
    x = torch.randn(3, 32, 128, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(x, name))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_better_coefficients_are_nearer_to_orthogonal_than_muons():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = {name: orthogonality_error(newton_schulz(x, name)).item() for name in NAMES}
    assert errors["quintic"] < errors["polar_express"] < errors["muon"]


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-5, 8),
)
def test_symmetries(m, n, name, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, dtype=torch.float64, generator=generator)
    ns = functools.partial(newton_schulz, coefficients=name, eps=1e-30)
    y = ns(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-8)
    close(ns(x.mT), y.mT)
    close(ns(x * 10.0**exponent), y)
    q = orthogonal(m, seed)
    close(ns(q @ x), q @ y)
    padded = torch.nn.functional.pad(x, (0, 3))
    # Padding changes the shape, and with it what a set that depends on the shape would take.
    same = dataclasses.replace(
        COEFFICIENTS[name], triples=COEFFICIENTS[name].schedule(shape=(m, n)), by_shape=()
    )
    close(ns(padded, coefficients=same), torch.nn.functional.pad(y, (0, 3)))


@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 3, 6, 4), (1, 5, 5)])
def test_batch_equals_one_at_a_time(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.stack([newton_schulz(m) for m in x.flatten(0, -3)]).view(shape)
    torch.testing.assert_close(newton_schulz(x), one_by_one, rtol=1e-5, atol=1e-6)


def test_row_orthonormal_input_is_scaled():
    x = orthogonal(8, 0)[:3]
    expected = x * polynomial(torch.tensor(3.0, dtype=torch.float64) ** -0.5, "muon")
    torch.testing.assert_close(newton_schulz(x, eps=1e-30), expected)


def test_one_row_becomes_the_normalised_vector_times_p_of_one():
    x = torch.tensor([[3.0, 0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(
        newton_schulz(x, eps=1e-30), x / 5 * polynomial(torch.tensor(1.0).double(), "muon")
    )


def test_zero_stays_zero_and_bad_matrices_do_not_spread():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    clean = newton_schulz(x)
    x[0] = 0
    x[1, 2, 2] = float("nan")
    x[2, 0, 0] = float("inf")
    y = newton_schulz(x)
    assert y[0].eq(0).all()
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[3], clean[3])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (0, 3, 3)])
def test_empty(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norm_does_not_overflow(dtype):
    x = (torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * 3000).to(dtype)
    y = newton_schulz(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), newton_schulz(x.float()), rtol=0, atol=0.05)


def test_iteration_dtype_is_separate_from_the_result():
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    y = newton_schulz(x, dtype=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    torch.testing.assert_close(y, newton_schulz(x), rtol=0, atol=0.03)


def test_agrees_with_torch_muon_in_direction():
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(24, 40))
    w.grad = torch.randn(24, 40, generator=generator)
    torch.optim.Muon([w], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    cosine = torch.nn.functional.cosine_similarity(
        w.detach().flatten(), -newton_schulz(w.grad).flatten(), dim=0
    )
    assert cosine > 0.999


def test_input_is_left_alone_and_gradient_flows():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    newton_schulz(x)
    assert torch.equal(x, before)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: newton_schulz(t, steps=2), (x,))


def test_compiles_without_graph_breaks():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(newton_schulz, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), newton_schulz(x))


def test_list_of_triples():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = [(3.4445, -4.7750, 2.0315)]
    torch.testing.assert_close(newton_schulz(x, once, 5), newton_schulz(x, once * 5))
    torch.testing.assert_close(newton_schulz(x, once, 5), newton_schulz(x, "muon"))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: newton_schulz(x, "moun"), ValueError, "moun.*cans.*polar_express"),
        (lambda x: newton_schulz(x, []), ValueError, "empty"),
        (lambda x: newton_schulz(x, [(1.0, 2.0)]), ValueError, "triples"),
        (lambda x: newton_schulz(x, [1.0, 2.0, 3.0]), ValueError, "triples"),
        (lambda x: newton_schulz(x, steps=0), ValueError, "at least 1"),
        (lambda x: newton_schulz(x, "cans", 6), ValueError, "steps=6"),
        (lambda x: newton_schulz(x[0]), ValueError, r"\(3,\)"),
        (lambda x: newton_schulz(x.long()), TypeError, "int64"),
        (lambda x: newton_schulz(x.cfloat()), TypeError, "complex64"),
        (lambda x: orthogonality_error(x[0]), ValueError, r"\(3,\)"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(2, 3))


def test_every_set_has_a_source_and_a_working_schedule():
    for name, chosen in COEFFICIENTS.items():
        assert resolve_coefficients(name) is chosen
        assert len(chosen.schedule()) == chosen.steps
        assert chosen.source


def test_orthogonality_error_by_hand():
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    expected = ((0 + 9 + 64) / 3) ** 0.5
    batch = torch.stack([x, x])
    torch.testing.assert_close(orthogonality_error(batch), torch.full((2,), expected))
    assert orthogonality_error(orthogonal(6, 0)[:, :2]) < 1e-14
