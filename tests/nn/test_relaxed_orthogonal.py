import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from weightlab.linalg import orthogonality_deviation, polar_factor, relaxed_polar_factor
from weightlab.nn import RelaxedOrthogonal, relaxed_orthogonal

METHODS = ["svd", "polar"]
SHAPES = [(5, 5), (3, 7), (7, 3), (1, 4), (2, 3, 4)]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(W, tol):
    """One matrix, in the plainest form."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    D = (s**2 - 1).square().sum().sqrt()
    return U @ torch.diag((1 + (s**2 - 1) * min(1.0, tol / float(D))).sqrt()) @ Vh


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 2])
@pytest.mark.parametrize("tol", [0.0, 0.01, 0.8])
def test_is_the_formula(method, shape, tol):
    W = gaussian(*shape)
    torch.testing.assert_close(
        relaxed_polar_factor(W, tol, method=method), reference(W, tol), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0, 5), st.floats(0.05, 3), st.integers(0, 2**31 - 1))
def test_deviation_is_the_smaller_of_both_and_staying_there_is_idempotent(method, m, n, tol, scale, seed):
    W = scale * gaussian(m, n, seed=seed)
    P = relaxed_polar_factor(W, tol, method=method)
    D = orthogonality_deviation(W)
    # Polar by the Gram matrix loses digits with the square of the condition number.
    allowed = 1e-10 if method == "svd" else 1e-13 * float(torch.linalg.cond(W)) ** 2 + 1e-10
    assert abs(float(orthogonality_deviation(P)) - min(float(D), tol)) < allowed
    torch.testing.assert_close(relaxed_polar_factor(P, tol, method=method), P, rtol=0, atol=allowed)
    # Singular vectors stay: PᵀW is symmetric and nonnegative.
    product = P.mT @ W
    torch.testing.assert_close(product, product.mT, rtol=0, atol=allowed * (1 + float(D)))
    assert torch.linalg.eigvalsh(product).min() > -allowed * (1 + float(D))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_ends_are_polar_factor_and_identity(method, shape):
    W = gaussian(*shape)
    torch.testing.assert_close(relaxed_polar_factor(W, 0.0, method=method), polar_factor(W))
    assert torch.equal(relaxed_polar_factor(W, math.inf, method=method), W)
    assert torch.equal(relaxed_polar_factor(W, 1e6, method=method), W)
    half = W.bfloat16()
    layer = RelaxedOrthogonal(1e6, method=method)
    assert layer(half).dtype == torch.bfloat16
    assert torch.equal(layer(half), half)


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (2, 5, 3)])
def test_a_decomposition_that_does_not_converge_is_done_again(shape, monkeypatch):
    W = gaussian(*shape, dtype=torch.float32)
    expected, polar = relaxed_polar_factor(W, 0.3), polar_factor(W)
    svd = torch.linalg.svd

    def gives_up(A, full_matrices=True):
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(A, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    found = relaxed_polar_factor(W, 0.3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(polar_factor(W), polar)
    W.requires_grad_()
    relaxed_polar_factor(W, 0.3).square().sum().backward()
    assert W.grad.isfinite().all()


def test_matrices_of_a_batch_within_the_tolerance_stay_bit_for_bit():
    W = torch.stack([gaussian(4, 4), torch.eye(4, dtype=torch.float64) * 1.01])
    P = relaxed_polar_factor(W, 0.5)
    assert torch.equal(P[1], W[1])
    torch.testing.assert_close(P[0], reference(W[0], 0.5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tol", [0.0, 0.3, 1.5, 1e3])
def test_gradcheck(method, shape, tol):
    W = gaussian(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: relaxed_polar_factor(w, tol, method=method), (W,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("tol", [0.0, 0.3])
def test_equal_singular_values_have_the_exact_gradient(method, shape, tol):
    W = (2 * torch.eye(*shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: relaxed_polar_factor(w, tol, method=method), (W,))


def test_gradient_is_that_through_the_decomposition():
    W = gaussian(4, 6, seed=2).requires_grad_()
    weights = gaussian(4, 6, seed=3)

    def through_svd(w):
        U, s, Vh = torch.linalg.svd(w, full_matrices=False)
        D = (s**2 - 1).square().sum().sqrt()
        return U @ torch.diag((1 + (s**2 - 1) * 0.6 / D).sqrt()) @ Vh

    (expected,) = torch.autograd.grad((weights * through_svd(W)).sum(), W)
    (found,) = torch.autograd.grad((weights * relaxed_polar_factor(W, 0.6)).sum(), W)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [0.0, 0.4])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_lost_ranks_leave_gradients_finite(method, tol, rank):
    W = (gaussian(5, rank) @ gaussian(rank, 4, seed=1)).float().requires_grad_()
    (gaussian(5, 4, dtype=torch.float32) * relaxed_polar_factor(W, tol, method=method)).sum().backward()
    assert W.grad.isfinite().all()


def test_nan_stays_in_its_matrix():
    W = torch.stack([torch.full((2, 3), math.nan), gaussian(2, 3, dtype=torch.float32)])
    P = relaxed_polar_factor(W, 0.1)
    assert P[0].isnan().all()
    torch.testing.assert_close(P[1], relaxed_polar_factor(W[1], 0.1))


# Dynamo itself does what PyTorch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_functional_transforms_and_compiling():
    W, weights = gaussian(3, 4, 4), gaussian(4, 4, seed=5)

    def loss(w):
        return (relaxed_polar_factor(w, 0.3) * weights).sum()

    expected = torch.stack([torch.autograd.grad(loss(w), w)[0] for w in W.clone().requires_grad_().unbind()])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(W), expected)
    compiled = torch.compile(relaxed_polar_factor, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(W, 0.3), relaxed_polar_factor(W, 0.3))


def test_second_derivatives_are_refused():
    W = gaussian(3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(relaxed_polar_factor(W, 0.1).square().sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class TestParametrization:
    def layer(self, rows=6, columns=6, **settings):
        torch.manual_seed(0)
        layer = nn.Linear(columns, rows)
        with torch.no_grad():
            layer.weight.mul_(3)
        return relaxed_orthogonal(layer, **settings)

    @pytest.mark.parametrize("shape", [(6, 6), (4, 7), (7, 4)])
    @pytest.mark.parametrize("tol", [0.0, 0.25])
    def test_training_never_leaves_the_tolerance(self, shape, tol):
        layer = self.layer(*shape, tol=tol)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        x, target = gaussian(32, shape[1], dtype=torch.float32), gaussian(32, shape[0], seed=1).float()
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            assert orthogonality_deviation(layer.weight).item() <= tol + 1e-5
        assert losses[-1] < losses[0]

    def test_the_optimum_within_the_tolerance_is_found(self):
        # With tr(WᵀT) as the goal, the best W of the ball has T's singular vectors; values follow a one-dimensional search.
        layer = self.layer(3, 3, tol=0.5)
        target = torch.diag(torch.tensor([3.0, 1.0, 0.2]))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
        for _ in range(200):
            optimizer.zero_grad()
            (-(layer.weight * target).sum()).backward()
            optimizer.step()
        best = -math.inf
        angles = torch.linspace(0, math.pi, 400)
        for a in angles:
            directions = torch.stack(
                [
                    torch.cos(a).expand(800),
                    *(torch.sin(a) * f(2 * angles.repeat(2)) for f in (torch.cos, torch.sin)),
                ]
            )
            values = (1 + 0.5 * directions).clamp_min(0).sqrt()
            best = max(best, float((values * target.diagonal()[:, None]).sum(0).max()))
        assert (layer.weight * target).sum().item() == pytest.approx(best, rel=2e-3)

    def test_assigned_weights_are_brought_within(self):
        layer = self.layer(tol=0.5)
        outside, inside = 2 * torch.eye(6), 1.01 * torch.eye(6)
        layer.weight = outside
        torch.testing.assert_close(layer.weight, reference(outside, 0.5))
        torch.testing.assert_close(layer.parametrizations.weight.original, layer.weight)
        layer.weight = inside
        assert torch.equal(layer.weight, inside)

    def test_removing_leaves_the_values(self):
        layer = self.layer(tol=0.3)
        before = layer.weight.detach().clone()
        parametrize.remove_parametrizations(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer.weight, before)
        assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]

    def test_state_dicts_and_copies(self):
        layer, other = self.layer(tol=0.3), self.layer(tol=0.3)
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(0.3)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(copy.deepcopy(layer).weight, layer.weight)

    def test_relative_tolerance(self):
        layer = self.layer(4, 9, tol=0.1, relative=True)
        assert orthogonality_deviation(layer.weight).item() == pytest.approx(0.2, rel=1e-5)

    def test_half_precision(self):
        layer = relaxed_orthogonal(nn.Linear(16, 16).bfloat16(), tol=0.0)
        assert layer.weight.dtype == torch.bfloat16
        assert orthogonality_deviation(layer.weight).item() < 0.05

    @pytest.mark.parametrize(
        ("module", "settings", "message"),
        [
            (nn.Linear(2, 2), {"tol": -1.0}, "tol must be at least 0, got -1"),
            (nn.Linear(2, 2), {"tol": 1.0, "method": "qr"}, "method must be"),
            (nn.Linear(2, 2), {"tol": 1.0, "name": "wieght"}, "Linear has no tensor 'wieght'"),
            (nn.Linear(2, 2), {"tol": 1.0, "name": "bias"}, r"must be a matrix, got shape \(2,\)"),
            (nn.Conv2d(2, 2, 3), {"tol": 1.0}, "an orthogonal kernel is no orthogonal convolution"),
        ],
    )
    def test_bad_requests(self, module, settings, message):
        with pytest.raises(ValueError, match=message):
            relaxed_orthogonal(module, **settings)
        assert not parametrize.is_parametrized(module)


@pytest.mark.parametrize(
    ("A", "tol", "method", "error", "message"),
    [
        (torch.ones(3), 0.1, "svd", ValueError, r"\(3,\)"),
        (torch.ones(3, 3, dtype=torch.int64), 0.1, "svd", TypeError, "torch.int64"),
        (torch.ones(3, 3), math.nan, "svd", ValueError, "tol must be at least 0, got nan"),
        (torch.ones(3, 3), 0.1, "eigh", ValueError, "method must be"),
    ],
)
def test_bad_input(A, tol, method, error, message):
    with pytest.raises(error, match=message):
        relaxed_polar_factor(A, tol, method=method)
