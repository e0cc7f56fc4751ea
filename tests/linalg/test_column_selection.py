import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import dct_matrix, expand_basis_columns, select_basis_columns
from weightlab.linalg.column_selection import basis_vectors, carry_columns, resolve_rank

BASES = ["dct2", "dct3", "random", "identity"]


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def vectors(basis, n, dtype=torch.float64):
    return basis_vectors(torch.arange(n), n, basis, dtype)


def projection(G, rank, **options):
    low, indices = select_basis_columns(G, rank, **options)
    return expand_basis_columns(low, indices, G.shape, basis=options.get("basis", "dct2"))


def reference(G, rank, Q, norm):
    """Tall G, basis in the columns of Q: straight from the definition."""
    S = G @ Q
    scores = [(-S[:, j].abs().pow(norm).sum().item(), j) for j in range(Q.shape[1])]
    chosen = sorted(j for _, j in sorted(scores)[:rank])
    return S[:, chosen], torch.tensor(chosen)


def test_bases_are_what_they_are_called():
    n = 7
    C = dct_matrix(n, dtype=torch.float64)
    assert torch.equal(vectors("dct2", n), C)
    assert torch.equal(vectors("dct3", n), C.T)
    assert torch.equal(vectors("identity", n), torch.eye(n, dtype=torch.float64))
    Q = vectors("random", n)
    torch.testing.assert_close(Q @ Q.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(Q, vectors("random", n))


@pytest.mark.parametrize("basis", ["dct2", "dct3"])
@pytest.mark.parametrize("n", [4096, 4097])
def test_vectors_of_large_bases_are_computed_alike(basis, n):
    indices = torch.tensor([0, 1, 77, n - 1])
    i, j = (indices, torch.arange(n)) if basis == "dct2" else (torch.arange(n), indices)
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] = math.sqrt(1 / n)
    rows = scale[i][:, None] * torch.cos(math.pi * i.double()[:, None] * (2 * j + 1) / (2 * n))
    expected = rows if basis == "dct2" else rows.T
    torch.testing.assert_close(basis_vectors(indices, n, basis, torch.float64), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", [(9, 6), (12, 7), (5, 5), (300, 8)])
def test_follows_the_definition(shape, basis, transform, norm):
    G = gaussian(*shape)
    low, indices = reference(G, 3, vectors(basis, shape[1]).T, norm)
    got, chosen = select_basis_columns(G, 3, basis=basis, norm=norm, transform=transform)
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(got, low)
    # Pieces that fit the cache, the plain way and batches are the same thing.
    with torch.no_grad():
        got, chosen = select_basis_columns(G, 3, basis=basis, norm=norm, transform=transform)
    torch.testing.assert_close(got, low)
    batch = torch.stack([gaussian(*shape, seed=5), G])
    got, chosen = select_basis_columns(batch, 3, basis=basis, norm=norm, transform=transform)
    assert torch.equal(chosen[1], indices)
    torch.testing.assert_close(got[1], low)
    torch.testing.assert_close(
        expand_basis_columns(got, chosen, batch.shape, basis=basis)[1],
        projection(G, 3, basis=basis, norm=norm),
    )


def test_pieces_of_a_large_matrix_add_up():
    G = gaussian(900, 300, dtype=torch.float32)
    with torch.no_grad():
        low, indices = select_basis_columns(G, 20, transform="fft")
    expected, chosen = reference(G.double(), 20, dct_matrix(300, dtype=torch.float64).T, 1)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(low.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("basis", BASES)
def test_wide_matrices_are_treated_as_their_transposes(basis):
    G = gaussian(6, 11)
    low, indices = select_basis_columns(G, 2, basis=basis)
    low_t, indices_t = select_basis_columns(G.T, 2, basis=basis)
    assert low.shape == (2, 11)
    assert torch.equal(indices, indices_t)
    torch.testing.assert_close(low, low_t.T)
    torch.testing.assert_close(projection(G, 2, basis=basis), projection(G.T, 2, basis=basis).T)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    basis=st.sampled_from(BASES),
    seed=st.integers(0, 99),
)
def test_projection_is_orthogonal_contractive_and_no_better_than_svd(m, n, rank, basis, seed):
    G = gaussian(m, n, seed=seed)
    P = projection(G, rank, basis=basis, norm=2)
    r, short = min(rank, m, n), min(m, n)
    error = (G - P).square().sum()
    total = G.square().sum()
    torch.testing.assert_close(P.square().sum() + error, total)
    torch.testing.assert_close(projection(P, rank, basis=basis, norm=2), P)
    assert error <= (1 - r / short) * total + 1e-10 * total
    assert error >= torch.linalg.svdvals(G)[r:].square().sum() - 1e-10 * total
    if r == short:
        torch.testing.assert_close(P, G)


@pytest.mark.parametrize("basis", BASES)
def test_no_other_columns_leave_less(basis):
    G = gaussian(8, 6)
    rows = vectors(basis, 6)
    errors = {
        pair: (G - G @ rows[list(pair)].T @ rows[list(pair)]).norm().item()
        for pair in itertools.combinations(range(6), 2)
    }
    _, indices = select_basis_columns(G, 2, basis=basis, norm=2)
    assert tuple(indices.tolist()) == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_what_lies_in_the_span_is_recovered(transform):
    chosen = torch.tensor([0, 4, 5, 8])
    rows = basis_vectors(chosen, 9, "dct2", torch.float64)
    G = gaussian(20, 4) @ rows
    low, indices = select_basis_columns(G, 4, transform=transform)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(expand_basis_columns(low, indices, G.shape), G)


def test_ties_go_to_the_lower_index():
    for n in (5, 300):
        _, indices = select_basis_columns(torch.ones(n, n), 3, basis="identity")
        assert indices.tolist() == [0, 1, 2]
    G = torch.eye(8)[:, [3, 1, 0, 2, 4, 5, 6, 7]]
    G[:, 6] *= 2
    assert select_basis_columns(G, 3, basis="identity")[1].tolist() == [0, 1, 6]


def test_smooth_matrices_favour_cosines_and_others_do_not():
    noise = gaussian(200, 64)
    walk = noise.cumsum(1)
    error = {
        (name, basis): ((G - projection(G, 16, basis=basis)).norm() / G.norm()).item()
        for name, G in (("noise", noise), ("walk", walk))
        for basis in ("dct2", "random")
    }
    assert error["walk", "dct2"] < 0.25 < 0.5 < error["walk", "random"]
    assert error["noise", "dct2"] == pytest.approx(error["noise", "random"], rel=0.05)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), seed=st.integers(0, 9))
def test_carrying_is_the_product_of_the_bases(data, n, seed):
    def draw():
        return torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))

    previous, current = draw(), draw()
    moments = gaussian(3, len(previous), seed=seed)
    Q = vectors("dct2", n).T
    expected = moments @ Q[:, previous].T @ Q[:, current]
    carried, positive = carry_columns([moments, moments.abs()], previous, current)
    torch.testing.assert_close(carried, expected, rtol=1e-6, atol=1e-12)
    assert (positive >= 0).all()
    assert torch.equal(carry_columns([moments], previous, previous)[0], moments)


def test_carrying_drops_nan_and_takes_batches():
    moments = torch.tensor([[[1.0, torch.nan]], [[3.0, 4.0]]])
    previous, current = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[0, 1], [1, 2]])
    (carried,) = carry_columns([moments], previous, current)
    assert torch.equal(carried, torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]]))


def test_nan_stays_in_the_projection_and_half_is_computed_in_float32():
    G = gaussian(6, 4, dtype=torch.float32)
    G[2, 1] = torch.nan
    assert projection(G, 2).isnan().any(1).tolist() == [False, False, True, False, False, False]
    low, _ = select_basis_columns(gaussian(6, 4).bfloat16(), 2)
    assert low.dtype == torch.float32


def test_rank_as_a_fraction():
    assert [resolve_rank(rank, 10) for rank in (0.25, 0.01, 1.0, 3, 99)] == [2, 1, 10, 3, 10]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda G: select_basis_columns(G, 0), ValueError, "rank must be at least 1, got 0"),
        (lambda G: select_basis_columns(G, 1.5), ValueError, "rank as a fraction.*1.5"),
        (lambda G: select_basis_columns(G, "1"), TypeError, "rank"),
        (lambda G: select_basis_columns(G, True), TypeError, "rank"),
        (lambda G: select_basis_columns(G, 1, basis="haar"), ValueError, "basis.*dct2.*'haar'"),
        (lambda G: select_basis_columns(G, 1, norm=3), ValueError, "norm must be 1 or 2, got 3"),
        (lambda G: select_basis_columns(G, 1, transform="x"), ValueError, "transform"),
        (lambda G: select_basis_columns(G[0], 1), ValueError, r"\(3,\)"),
        (lambda G: select_basis_columns(G[:0], 1), ValueError, r"\(0, 3\)"),
        (lambda G: select_basis_columns(G.long(), 1), TypeError, "int64"),
        (lambda G: expand_basis_columns(G, torch.tensor([0]), (4, 3), basis="x"), ValueError, "basis"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(4, 3))
