import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from weightlab.linalg import orthogonality_deviation, orthogonality_error
from weightlab.nn import Deviation, OrthogonalityPenalty, find_weights, relaxed_orthogonal

GATES = ["hinge2", "softplus", "sigmoid"]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(n, seed=0):
    return torch.linalg.qr(gaussian(n, n, seed=seed)).Q


def reference(W, tol, gate, sharpness):
    """The three gates by the formulas, on the full Gram matrix of the short side by singular values."""
    D = (torch.linalg.svdvals(W) ** 2 - 1).square().sum().sqrt().item()
    if gate == "hinge2":
        return max(0.0, D - tol) ** 2
    if gate == "softplus":
        return math.log1p(math.exp(sharpness * (D - tol))) / sharpness
    return D / (1 + math.exp(-sharpness * (D - tol)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("tol", [0.0, 3.0, 30.0])
def test_is_the_formula(gate, shape, tol):
    W = gaussian(*shape) / 2
    penalty = OrthogonalityPenalty(tol, gate, sharpness=2.0)
    assert float(penalty(W)) == pytest.approx(reference(W, tol, gate, 2.0), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (4, 4)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_deviation_of_a_scaled_orthogonal_matrix(shape, scale):
    k = min(shape)
    W = scale * orthogonal(max(shape))[: shape[0], : shape[1]]
    assert float(orthogonality_deviation(W)) == pytest.approx(math.sqrt(k) * abs(scale**2 - 1))
    assert float(orthogonality_error(W)) == pytest.approx(abs(scale**2 - 1))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.floats(0, 4), st.sampled_from(GATES), st.integers(0, 2**31 - 1)
)
def test_rotations_change_nothing(m, n, tol, gate, seed):
    W = gaussian(m, n, seed=seed)
    penalty = OrthogonalityPenalty(tol, gate)
    turned = orthogonal(m, seed + 1) @ W @ orthogonal(n, seed + 2)
    torch.testing.assert_close(penalty(turned), penalty(W), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(penalty(W.mT), penalty(W), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3)])
def test_gradient_of_the_deviation_is_in_closed_form(shape):
    W = gaussian(*shape).requires_grad_()
    D = orthogonality_deviation(W)
    D.backward()
    wide = W.detach() if shape[0] <= shape[1] else W.detach().mT
    expected = 2 * (wide @ wide.mT - torch.eye(len(wide), dtype=torch.float64)) @ wide / D.detach()
    torch.testing.assert_close(W.grad, expected if shape[0] <= shape[1] else expected.mT)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 5)])
def test_gradcheck(gate, shape):
    penalty = OrthogonalityPenalty(0.7, gate, sharpness=2.0)
    W = gaussian(*shape).requires_grad_()
    assert torch.autograd.gradcheck(penalty, (W,))
    assert torch.autograd.gradgradcheck(penalty, (W,))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tol", [0.0, 1.0])
def test_an_orthogonal_weight_has_a_finite_gradient(gate, tol):
    W = torch.eye(4, 6).requires_grad_()
    OrthogonalityPenalty(tol, gate)(W).backward()
    assert torch.equal(W.grad, torch.zeros(4, 6))


def test_the_hinge_leaves_weights_within_the_tolerance_alone():
    W = (1.1 * torch.eye(4)).requires_grad_()
    D = float(orthogonality_deviation(W.detach()))
    for tol, inside in [(D * 1.01, True), (D * 0.99, False)]:
        W.grad = None
        penalty = OrthogonalityPenalty(tol)(W)
        penalty.backward()
        assert (penalty.item() == 0) == inside
        assert bool((W.grad == 0).all()) == inside


def test_only_the_hinge_arrives_at_the_tolerance():
    target = gaussian(8, 8, seed=3)
    ends = {}
    for gate in GATES:
        W = orthogonal(8, seed=4).requires_grad_()
        penalty = OrthogonalityPenalty(0.5, gate)
        optimizer = torch.optim.Adam([W], lr=0.02)
        for step in range(250):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 250)
            optimizer.zero_grad()
            ((W - target).square().mean() + 100 * penalty(W)).backward()
            optimizer.step()
        ends[gate] = float(orthogonality_deviation(W.detach()))
    assert ends["hinge2"] == pytest.approx(0.5, rel=0.02)
    assert ends["sigmoid"] < 0.1
    assert ends["softplus"] < 0.25


def test_relative_tolerance_is_one_for_a_direction():
    W = 2 * torch.eye(9, 12)
    assert OrthogonalityPenalty(0.5, relative=True)(W) == OrthogonalityPenalty(1.5)(W) == (9 - 1.5) ** 2


def test_batches_are_matrices_one_by_one():
    W = gaussian(2, 3, 4, 5)
    penalty = OrthogonalityPenalty(0.3, "softplus")
    expected = torch.stack([torch.stack([penalty(matrix) for matrix in row]) for row in W])
    torch.testing.assert_close(penalty(W), expected)


def test_half_precision_has_its_gram_matrix_in_float32():
    W = gaussian(32, 32, dtype=torch.bfloat16)
    penalty = OrthogonalityPenalty(1.0)
    assert penalty(W).dtype == torch.float32
    assert torch.equal(penalty(W), penalty(W.float()))
    W.requires_grad_()
    penalty(W).backward()
    assert W.grad.dtype == torch.bfloat16


def test_strides_do_not_matter():
    padded = gaussian(8, 14)
    W = padded[::2, ::2]
    penalty = OrthogonalityPenalty(0.3, "sigmoid")
    torch.testing.assert_close(penalty(W), penalty(W.contiguous()))


def test_compiles():
    penalty = OrthogonalityPenalty(0.3, "softplus")
    W = gaussian(4, 5)
    torch.testing.assert_close(torch.compile(penalty, fullgraph=True, backend="aot_eager")(W), penalty(W))


def test_a_form_of_ones_own():
    def blocks(weight):
        """Kernels as matrices from all entries of a patch."""
        return Deviation(orthogonality_deviation(weight.flatten(1)), len(weight))

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 4))
    penalty = OrthogonalityPenalty(0.1, relative=True, form=blocks)
    kernel = model[0].weight
    expected = OrthogonalityPenalty(0.1, relative=True)(kernel.flatten(1))
    torch.testing.assert_close(penalty(kernel), expected)
    assert list(penalty.deviations(model)) == ["0.weight", "1.weight"]
    assert list(OrthogonalityPenalty().deviations(model)) == ["1.weight"]


class TestModels:
    def model(self):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.embed = nn.Embedding(10, 6)
        model.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv1d(2, 2, 3))
        model.attention = nn.MultiheadAttention(6, 2)
        model.head = nn.Linear(6, 3)
        return model

    def test_matrices_are_found_by_pattern(self):
        model = self.model()
        matrices = ["body.0.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
        assert list(find_weights(model)) == matrices
        assert list(find_weights(model, matrices_only=False)) == [
            "body.0.weight",
            "body.2.weight",
            *matrices[1:],
        ]
        assert list(find_weights(model, ["body.*", "head.*"])) == ["body.0.weight", "head.weight"]
        assert list(find_weights(model, "*", exclude=["attention.*", "head*"])) == ["body.0.weight"]

    def test_total_is_the_sum_and_trains(self):
        model = self.model()
        penalty = OrthogonalityPenalty(0.2)
        total = penalty.total(model, exclude="head.*")
        total.backward()
        expected = sum(penalty(w) for w in find_weights(model, exclude="head.*").values())
        torch.testing.assert_close(total, expected)
        assert model.head.weight.grad is None
        assert model.body[0].weight.grad.abs().sum() > 0
        deviations = penalty.deviations(model)
        torch.testing.assert_close(deviations["head.weight"], orthogonality_deviation(model.head.weight))
        assert not deviations["head.weight"].requires_grad

    def test_parametrized_weights_are_what_the_layer_computes_with(self):
        model = nn.Sequential(relaxed_orthogonal(nn.Linear(4, 4), tol=0.5), nn.Linear(4, 4))
        found = find_weights(model, "0.*")
        assert list(found) == ["0.weight"]
        torch.testing.assert_close(found["0.weight"], model[0].weight)
        assert found["0.weight"].requires_grad
        assert parametrize.is_parametrized(model[0])

    def test_tied_weights_count_once(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        assert list(find_weights(model)) == ["0.weight"]

    def test_a_pattern_that_finds_nothing_is_told(self):
        with pytest.raises(
            ValueError, match=r"no weight matches include='blocks.*', .* there are: body.0.weight,"
        ):
            OrthogonalityPenalty().total(self.model(), "blocks.*")
        with pytest.raises(ValueError, match="there are: none"):
            find_weights(nn.ReLU())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": -0.1}, "tol must be at least 0, got -0.1"),
        ({"tol": math.nan}, "tol must be at least 0, got nan"),
        ({"gate": "hinge"}, "gate must be one of .* got 'hinge'"),
        ({"sharpness": 0.0}, "sharpness must be above 0, got 0"),
        ({"form": "conv"}, "form must be .* got 'conv'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        OrthogonalityPenalty(**settings)


def test_bad_weights():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        OrthogonalityPenalty()(torch.ones(3))


def test_settings_are_shown():
    assert "tol=0.5, gate='softplus', sharpness=5" in repr(OrthogonalityPenalty(0.5, "softplus", 5.0))
