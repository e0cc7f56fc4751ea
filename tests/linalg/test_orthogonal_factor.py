import pytest
import torch

from weightlab.linalg import cholesky_qr, eigenbasis, polar_factor, qr_factor


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conditioned(k, condition, seed=0, dtype=torch.float32):
    U, _, Vh = torch.linalg.svd(gaussian(k, k, seed=seed, dtype=torch.float64))
    return (
        U * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), k, dtype=torch.float64) @ Vh
    ).to(dtype)


def error(Q):
    Q = Q.double()
    return (Q.mT @ Q - torch.eye(Q.size(-1), dtype=Q.dtype)).norm()


BACKENDS = ["householder", "cholesky"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (3, 6, 6), (2, 2, 7, 3), (1, 1)])
def test_q_spans_the_leading_columns_with_positive_diagonal(backend, shape):
    A = gaussian(*shape, dtype=torch.float64)
    Q = qr_factor(A, backend)
    R = Q.mT @ A
    torch.testing.assert_close(Q @ R, A)
    torch.testing.assert_close(R.triu(), R, rtol=0, atol=1e-12)
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_float32_is_orthogonal_at_any_scale(backend, condition, scale):
    assert error(qr_factor(scale * conditioned(128, condition), backend)) < 1e-4


def test_passes_of_cholesky_qr_bring_what_is_documented():
    errors = {
        passes: [float(error(cholesky_qr(conditioned(128, c), passes)[0])) for c in (1e1, 1e2, 1e3, 1e5)]
        for passes in (1, 2, 3)
    }
    assert errors[1][0] > 1e-4
    assert errors[1][2] > 0.5
    assert errors[2][1] < 1e-4 < errors[2][3]
    assert max(errors[3]) < 1e-4


def test_cholesky_qr_says_where_it_failed():
    A = torch.stack([conditioned(16, 1e2), torch.zeros(16, 16), torch.full((16, 16), float("nan"))])
    A = torch.cat([A, torch.ones(1, 16, 16)])
    Q, good = cholesky_qr(A)
    assert good.tolist() == [True, False, False, False]
    assert error(Q[0]) < 1e-4


def test_singular_matrices_fall_back_one_by_one():
    A = torch.stack([gaussian(8, 8), torch.ones(8, 8)])
    Q = qr_factor(A, "cholesky")
    torch.testing.assert_close(Q[0], qr_factor(A[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(Q[1], qr_factor(A[1]))
    old = torch.stack([torch.eye(8), -torch.eye(8)])
    Q = qr_factor(A, "cholesky", fallback=old)
    assert error(Q[0]) < 1e-4
    assert torch.equal(Q[1], -torch.eye(8))


@pytest.mark.parametrize("method", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (2, 4, 6)])
def test_polar_factor_is_the_nearest_orthogonal_matrix(method, shape):
    A = gaussian(*shape, dtype=torch.float64)
    P = polar_factor(A, method)
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    torch.testing.assert_close(P, U @ Vh)


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6])
def test_polar_factors_agree_in_float32(condition):
    A = conditioned(64, condition)
    by_svd, by_eigh = polar_factor(A), polar_factor(A, "eigh")
    assert by_svd.dtype == by_eigh.dtype == torch.float32
    assert error(by_svd) < 1e-4
    assert error(by_eigh) < 1e-4
    # Both maximise <P, A>; where A is flat the maximiser itself is ill-determined.
    torch.testing.assert_close((by_svd * A).sum(), (by_eigh * A).sum(), rtol=1e-5, atol=0)


def test_null_space_is_orthogonal_by_svd_and_zero_by_eigh():
    A = torch.ones(4, 4)
    assert error(polar_factor(A)) < 1e-5
    torch.testing.assert_close(polar_factor(A, "eigh"), A / 4)
    assert (polar_factor(torch.zeros(3, 3), "eigh") == 0).all()


def test_eigenbasis_diagonalises_from_large_to_small():
    S = gaussian(3, 6, 6, dtype=torch.float64)
    S = S @ S.mT
    D = eigenbasis(S).mT @ S @ eigenbasis(S)
    values = D.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(D, torch.diag_embed(values), rtol=0, atol=1e-12)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("f", [qr_factor, polar_factor, eigenbasis, lambda A: qr_factor(A, "cholesky")])
def test_nan_stays_in_its_matrix(f):
    A = gaussian(2, 4, 4)
    A = A + A.mT
    clean = f(A[1])
    A[0, 1, 2] = A[0, 2, 1] = float("nan")
    Q = f(A)
    assert Q[0].isnan().any()
    torch.testing.assert_close(Q[1], clean)


@pytest.mark.parametrize("f", [qr_factor, polar_factor, eigenbasis, lambda A: cholesky_qr(A)[0]])
def test_half_precision_comes_out_in_float32(f):
    A = torch.eye(3, dtype=torch.bfloat16)
    assert f(A).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "raised", "words"),
    [
        (lambda: qr_factor(torch.ones(2, 3)), ValueError, r"rows.*\(2, 3\)"),
        (lambda: cholesky_qr(torch.ones(2, 3)), ValueError, r"rows.*\(2, 3\)"),
        (lambda: cholesky_qr(torch.ones(2, 2), 0), ValueError, "passes.*0"),
        (lambda: cholesky_qr(torch.ones(2, 2), shift=-1.0), ValueError, "shift.*-1"),
        (lambda: qr_factor(torch.ones(2, 2), "gram"), ValueError, "householder.*'gram'"),
        (lambda: polar_factor(torch.ones(2, 2), "newton"), ValueError, "svd.*'newton'"),
        (lambda: eigenbasis(torch.ones(2, 3)), ValueError, "square"),
        (lambda: polar_factor(torch.ones(3)), ValueError, r"\(3,\)"),
        (lambda: qr_factor(torch.ones(2, 2, dtype=torch.int)), TypeError, "int32"),
    ],
)
def test_bad_input(call, raised, words):
    with pytest.raises(raised, match=words):
        call()
