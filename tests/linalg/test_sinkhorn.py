import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import sinkhorn_normalize


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(X, iters):
    """Rows, then columns, one after the other on the matrix itself."""
    m, n = X.shape
    for _ in range(iters):
        X = n**0.5 * X / X.norm(dim=1, keepdim=True)
        X = m**0.5 * X / X.norm(dim=0, keepdim=True)
    return X


@pytest.mark.parametrize("iters", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (1, 4), (4, 1), (6, 6)])
def test_equals_normalising_the_matrix_in_turns(shape, iters):
    X = gaussian(*shape)
    torch.testing.assert_close(sinkhorn_normalize(X, iters), reference(X, iters))


def test_batches_are_matrices_one_by_one():
    X = gaussian(2, 3, 4, 5)
    expected = torch.stack([torch.stack([reference(x, 5) for x in xs]) for xs in X])
    torch.testing.assert_close(sinkhorn_normalize(X), expected)


@pytest.mark.parametrize(("iters", "spread"), [(1, 2e-2), (2, 9e-4), (5, 3e-7)])
def test_columns_are_exact_and_rows_converge_as_documented(iters, spread):
    X = sinkhorn_normalize(gaussian(64, 128), iters)
    torch.testing.assert_close(X.norm(dim=0), torch.full((128,), 8.0, dtype=X.dtype))
    rows = (X.norm(dim=1) / 128**0.5 - 1).abs().max()
    assert spread / 4 < rows < 4 * spread


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-30, 30),
)
def test_scale_of_matrix_and_signs_of_rows_do_not_matter(m, n, seed, exponent):
    X = gaussian(m, n, seed=seed)
    Y = sinkhorn_normalize(X)
    torch.testing.assert_close(sinkhorn_normalize(X * 10.0**exponent), Y)
    signs = gaussian(m, 1, seed=seed + 1).sign()
    torch.testing.assert_close(sinkhorn_normalize(X * signs), Y * signs)
    assert (Y.sign() == X.sign()).all()


def test_permutations_pass_through():
    X = gaussian(5, 7)
    rows, columns = torch.randperm(5), torch.randperm(7)
    torch.testing.assert_close(
        sinkhorn_normalize(X[rows][:, columns]), sinkhorn_normalize(X)[rows][:, columns]
    )


def test_equal_magnitudes_are_a_fixed_point():
    X = gaussian(4, 6).sign()
    torch.testing.assert_close(sinkhorn_normalize(3.0 * X), X)


def test_zero_rows_and_columns_stay_zero_and_leave_the_others_alone():
    X = gaussian(4, 5)
    padded = torch.zeros(6, 7, dtype=X.dtype)
    padded[:4, :5] = X
    Y = sinkhorn_normalize(padded)
    assert (Y[4:] == 0).all()
    assert (Y[:, 5:] == 0).all()
    inner = Y[:4, :5] / Y[0, 0] * sinkhorn_normalize(X)[0, 0]
    torch.testing.assert_close(inner, sinkhorn_normalize(X))
    assert (sinkhorn_normalize(torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_is_that_of_the_input_and_extremes_stay_finite(dtype):
    X = gaussian(8, 16).to(dtype)
    Y = sinkhorn_normalize(X)
    assert Y.dtype == dtype
    torch.testing.assert_close(
        Y.double(), reference(X.double(), 5), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    X = torch.tensor([[1e-30, 2.0], [3.0, 1e30]])
    assert sinkhorn_normalize(X, 50).isfinite().all()


def test_nan_stays_in_its_matrix():
    X = gaussian(2, 3, 4)
    X[0, 1, 2] = float("nan")
    Y = sinkhorn_normalize(X)
    assert Y[0].isnan().any()
    torch.testing.assert_close(Y[1], reference(X[1], 5))


def test_gradients_flow_and_graphs_compile():
    X = gaussian(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn_normalize(x, 2), X)
    compiled = torch.compile(sinkhorn_normalize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X.detach()), sinkhorn_normalize(X.detach()))


def test_input_is_not_written_to_and_empty_ones_come_back():
    X = gaussian(3, 4)
    before = X.clone()
    sinkhorn_normalize(X)
    assert torch.equal(X, before)
    assert sinkhorn_normalize(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("X", "iters", "error", "words"),
    [
        (torch.ones(3), 5, ValueError, r"\(3,\)"),
        (torch.ones(2, 2), 0, ValueError, "iters.*0"),
        (torch.ones(2, 2, dtype=torch.long), 5, TypeError, "int64"),
    ],
)
def test_bad_input(X, iters, error, words):
    with pytest.raises(error, match=words):
        sinkhorn_normalize(X, iters)
