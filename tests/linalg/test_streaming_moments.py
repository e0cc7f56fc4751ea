import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import IncrementalPCA, MomentSketch, StreamingMoments

DIM = 6
MAKERS = {
    "moments": lambda: StreamingMoments(DIM),
    "incremental": lambda: IncrementalPCA(DIM, k=DIM),
    "sketch": lambda: MomentSketch(DIM, k=DIM),
}
KINDS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def rows(n=50, d=DIM, seed=0, dtype=torch.float64, mean=3.0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, dtype=dtype, generator=generator)
    return X * torch.linspace(3, 0.5, d, dtype=dtype) + mean


def reference(X, k, center):
    """Components, singular values and ratios by one SVD of all rows."""
    X = X - X.mean(0) if center else X
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    V = V * V.gather(-1, V.abs().argmax(-1, keepdim=True)).sign()
    return V[:k], s[:k], s[:k].square() / s.square().sum()


@KINDS
@pytest.mark.parametrize("center", [True, False])
def test_batches_give_what_one_svd_of_all_rows_gives(make, center):
    X = rows()
    stream = make()
    for batch in X.split([1, 7, 2, 30, 10]):
        stream.update(batch)
    # The sketch multiplies by probes in float32.
    tolerance = 2e-5 if isinstance(stream, MomentSketch) else 1e-9
    for got, expected in zip(stream.principal(3, center=center), reference(X, 3, center), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert stream.count == 50
    torch.testing.assert_close(stream.mean, X.mean(0))
    torch.testing.assert_close(stream.total, (X - X.mean(0)).square().sum())


@KINDS
def test_merging_equals_having_seen_all_rows(make):
    X = rows()
    one, first, second, empty = make().update(X), make().update(X[:13]), make().update(X[13:]), make()
    kept = copy.deepcopy(second.state_dict())
    merged = empty.merge(first).merge(second).merge(make())
    assert merged.count == one.count
    for got, expected in zip(merged.principal(4), one.principal(4), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for name, value in second.state_dict().items():
        assert torch.equal(value, kept[name])


@KINDS
def test_state_saves_and_resumes_to_the_bit(make, tmp_path):
    X = rows()
    stream, other = make().update(X[:20]), make()
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for got, expected in zip(
        other.update(X[20:]).principal(4), stream.update(X[20:]).principal(4), strict=True
    ):
        assert torch.equal(got, expected)


@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_covariance_does_not_depend_on_batches_or_order(cuts, seed):
    X = rows(40, seed=seed, dtype=torch.float32)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    stream = StreamingMoments(DIM)
    for batch in torch.tensor_split(X[order], sorted(cuts)):
        stream.update(batch)
    torch.testing.assert_close(stream.covariance(), torch.cov(X.double().T), rtol=1e-6, atol=1e-6)
    uncentered = X.double().T @ X.double() / 40
    torch.testing.assert_close(
        stream.covariance(center=False, correction=0), uncentered, rtol=1e-6, atol=1e-6
    )


def test_a_large_common_mean_costs_no_precision():
    X = rows(1000, mean=0.0)
    shifted = (X + 4096.0).float()
    stream = StreamingMoments(DIM)
    for batch in shifted.split(100):
        stream.update(batch)
    torch.testing.assert_close(stream.covariance(), torch.cov(shifted.double().T), rtol=1e-5, atol=1e-5)
    plain = shifted.T @ shifted / 999 - shifted.mean(0).outer(shifted.mean(0))
    assert (plain - torch.cov(X.T)).abs().max() > 0.1


def test_strips_of_wide_products_are_the_whole_product():
    X = torch.randn(40, 520, generator=torch.Generator().manual_seed(0))
    covariance = StreamingMoments(520).update(X).covariance()
    torch.testing.assert_close(covariance, torch.cov(X.double().T), rtol=1e-5, atol=1e-6)
    assert torch.equal(covariance, covariance.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_double(dtype):
    X = rows(3000, dtype=torch.float32).to(dtype)
    stream = StreamingMoments(DIM)
    for batch in X.split(100):
        stream.update(batch)
    assert stream.scatter.dtype == torch.float64
    torch.testing.assert_close(stream.covariance(), torch.cov(X.double().T), rtol=1e-5, atol=1e-5)


@KINDS
def test_shapes_and_memory_layout_do_not_matter(make):
    X = rows(24).reshape(2, 12, DIM)
    turned = X.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    expected = make().update(X.reshape(-1, DIM)).principal(2)
    for given_ in (X, turned):
        for got, value in zip(make().update(given_).principal(2), expected, strict=True):
            torch.testing.assert_close(got, value)
    stream = make().update(X)
    before = stream.state_dict()
    stream.update(X[:0])
    assert all(torch.equal(before[name], value) for name, value in stream.state_dict().items())


@KINDS
@pytest.mark.parametrize("X", [torch.full((9, DIM), 2.0), torch.zeros(1, DIM)], ids=["constant", "one row"])
def test_without_variance_there_are_orthonormal_directions_and_no_nan(make, X):
    directions, values, ratios = make().update(X).principal(DIM)
    torch.testing.assert_close(directions @ directions.T, torch.eye(DIM, dtype=torch.float64))
    assert values.abs().max() < 1e-6
    assert torch.equal(ratios, torch.zeros_like(ratios))


@KINDS
def test_a_constant_feature_gets_no_weight(make):
    X = rows(30)
    X[:, 2] = 7.0
    directions, _, ratios = make().update(X).principal(3)
    assert directions[:, 2].abs().max() < 1e-5
    assert bool(ratios.isfinite().all())


def test_incremental_truncation_keeps_what_has_rank_k():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64, generator=generator)).Q.T
    X = rows(60, 3, mean=1.0) @ basis
    pca = IncrementalPCA(40, k=4)
    for batch in X.split(2):
        pca.update(batch)
    for got, expected in zip(pca.principal(3), reference(X, 3, True), strict=True):
        torch.testing.assert_close(got, expected)


def test_incremental_with_few_rows_completes_the_basis():
    X = rows(2)
    directions, values, _ = IncrementalPCA(DIM, k=4).update(X).principal(4)
    torch.testing.assert_close(directions @ directions.T, torch.eye(4, dtype=torch.float64))
    assert values[1:].abs().max() < 1e-9
    difference = X[0] - X[1]
    assert abs(directions[0] @ difference) == pytest.approx(difference.norm())


def test_sketch_finds_leading_directions_of_a_decaying_spectrum():
    generator = torch.Generator().manual_seed(0)
    d, k = 300, 8
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    scales = 0.8 ** torch.arange(d, dtype=torch.float64)
    X = torch.randn(2000, d, dtype=torch.float64, generator=generator) * scales @ turn.T + 5
    sketch = MomentSketch(d, k)
    for batch in X.split(500):
        sketch.update(batch)
    directions, values, ratios = sketch.principal(k)
    expected, exact, shares = reference(X, k, True)
    assert ((directions @ expected.T).square().sum() / k) > 0.9999
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(ratios, shares, rtol=2e-3, atol=0)
    assert bool((values <= exact * (1 + 1e-6)).all())
    assert sketch.sketch.shape == (d, 2 * k + 16)


def test_bad_input_is_named():
    moments = StreamingMoments(DIM)
    with pytest.raises(ValueError, match=r"dim must be at least 1, got 0"):
        StreamingMoments(0)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        moments.update(torch.ones(2, DIM, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rows must have shape \(\.\.\., 6\), got \(2, 5\)"):
        moments.update(torch.ones(2, 5))
    with pytest.raises(ValueError, match="no principal components of no rows"):
        moments.principal(1)
    with pytest.raises(ValueError, match="more than 1 rows, got 0"):
        moments.covariance()
    with pytest.raises(ValueError, match=r"k must be in \[1, 6\], the length of the rows, got 7"):
        moments.principal(7)
    with pytest.raises(ValueError, match="at most 2, the components kept track of, got 3"):
        IncrementalPCA(DIM, k=2).update(rows()).principal(3)
    with pytest.raises(ValueError, match="at most 4, the width of the sketch, got 5"):
        MomentSketch(DIM, k=2, width=4).update(rows()).principal(5)
    with pytest.raises(ValueError, match="width must be at least k = 3, got 2"):
        MomentSketch(DIM, k=3, width=2)
    with pytest.raises(ValueError, match="sizes must be the same"):
        moments.merge(StreamingMoments(5))
    with pytest.raises(ValueError, match="state must hold"):
        moments.load_state_dict(IncrementalPCA(DIM, k=2).state_dict())
    with pytest.raises(ValueError, match=r"mean in the state has shape \(5,\), this object needs \(6,\)"):
        moments.load_state_dict(StreamingMoments(5).state_dict())


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_are_not_finite_are_told_of(make, value):
    X = rows(dtype=torch.float32)
    X[3, 1] = value
    stream = make().update(X).update(rows())
    with pytest.raises(ValueError, match="not finite, or too large"):
        stream.principal(2)
