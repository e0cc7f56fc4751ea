import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightlab.linalg import clip_outliers, outliers


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["all", "bracket", "device"])
def search(request, monkeypatch):
    """The three ways of finding the quantile."""
    monkeypatch.setattr(outliers, "_LARGE", 100 if request.param == "bracket" else 2**60)
    monkeypatch.setattr(outliers, "_PIECE", 300)
    if request.param == "device":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


def reference(x, q):
    """Soft-thresholding's remainder X − O, in float64 from the definition, for one matrix."""
    x = x.double().numpy()
    bound = np.quantile(np.abs(x), q, method="linear")
    outlying = np.sign(x) * np.maximum(np.abs(x) - bound, 0)
    return torch.from_numpy(x - outlying)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (13, 5), (40, 31), (97, 101)])
def test_equals_soft_thresholding(search, q, shape):
    heavy = gaussian(*shape) / gaussian(*shape, seed=1)
    for x in (gaussian(*shape), heavy, torch.ones(shape), heavy.round()):
        torch.testing.assert_close(clip_outliers(x, q).double(), reference(x, q), rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    st.floats(0.01, 1.0),
)
def test_invariants(array, q):
    x = torch.from_numpy(array)
    clipped = clip_outliers(x, q)
    assert (clipped.abs() <= x.abs()).all()
    assert (clipped * x >= 0).all()
    assert torch.equal(clip_outliers(-x, q), -clipped)
    assert torch.equal(clip_outliers(x * 4, q), clipped * 4)
    changed = int((clipped != x).sum())
    assert changed <= x.numel() - 1 - math.floor(q * (x.numel() - 1) - 1e-9)
    if q < 1 and changed:
        assert clipped.abs().max() <= clipped[clipped != x].abs().min()


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_share_of_clipped_entries(search, q):
    x = gaussian(50, 60)
    share = float((clip_outliers(x, q) != x).double().mean())
    assert share == pytest.approx(1 - q, abs=1 / x.numel())


def test_gaussian_keeps_what_theory_says():
    """ε = 1.645σ; energy 1 − 2φ(ε)ε − 2Q(ε)(1 − ε²) with Q(ε) = 0.05; and the angle to the input."""
    x = gaussian(700, 700)
    clipped = clip_outliers(x, 0.9)
    bound = 1.6448536
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    energy = 1 - 2 * density * bound - 0.1 * (1 - bound**2)
    inner = 0.9  # E[x·clip(x)] = P(|x| < ε), by Stein
    assert clipped.abs().max().item() == pytest.approx(bound, rel=5e-3)
    assert clipped.square().mean().item() == pytest.approx(energy, rel=5e-3)
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), clipped.flatten(), 0).item()
    assert cosine == pytest.approx(inner / math.sqrt(energy), rel=2e-3)


def test_one_clips_nothing():
    x = gaussian(9, 9)
    x[0, 0] = 1e30
    clipped = clip_outliers(x, 1.0)
    assert torch.equal(clipped, x)
    assert clipped.data_ptr() != x.data_ptr()


def test_batch_equals_one_at_a_time(search):
    x = gaussian(2, 3, 12, 11) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    together = clip_outliers(x, 0.9)
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], clip_outliers(x[i, j], 0.9))


def test_layout_does_not_matter(search):
    x = gaussian(30, 20)
    assert torch.equal(clip_outliers(x.T), clip_outliers(x).T)


def test_nan_is_seen_and_stays_in_its_matrix(search):
    x = gaussian(2, 12, 11)
    x[0, 3, 4] = math.nan
    for sample in (None, 10):
        clipped = clip_outliers(x, 0.9, sample=sample)
        assert clipped[0].isnan().all()
        assert clipped[1].isfinite().all()


def test_infinite_entries_are_clipped(search):
    x = gaussian(12, 11)
    expected = clip_outliers(x.clone().index_put_((torch.tensor(2),), torch.tensor(1e30)), 0.9)
    x[2] = math.inf
    torch.testing.assert_close(clip_outliers(x, 0.9), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(search, dtype):
    x = gaussian(40, 30).to(dtype)
    clipped = clip_outliers(x, 0.9)
    assert clipped.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(clipped.double(), reference(x, 0.9), rtol=tolerance, atol=0)


def test_eps_is_added_to_the_bound():
    assert clip_outliers(torch.tensor([0.0, 0.0, 0.0, 8.0]), 0.5, eps=0.25).tolist() == [0, 0, 0, 0.25]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 4), (0, 3, 4)])
def test_empty(shape):
    assert clip_outliers(torch.ones(shape)).shape == shape


def test_zero_stays_zero(search):
    assert not clip_outliers(torch.zeros(4, 5)).any()


def test_sampled_quantile_is_near_and_repeatable():
    x = gaussian(600, 500)
    clipped = clip_outliers(x, 0.9, sample=10_000)
    assert torch.equal(clipped, clip_outliers(x, 0.9, sample=10_000))
    share = float((clipped != x).double().mean())
    assert share == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 10_000))
    assert torch.equal(clip_outliers(x, 0.9, sample=x.numel()), clip_outliers(x, 0.9))


@pytest.mark.parametrize("shape", [(64, 64), (100, 10), (8, 300), (1, 4097), (512, 2048)])
def test_sample_takes_rows_and_columns_alike(shape):
    x = torch.arange(math.prod(shape)).view(shape).float()
    count = min(2048, math.prod(shape) // 4)
    places = outliers._spread(x.flatten(), count).long()
    assert (places.diff() > 0).all()
    assert places.max() < x.numel()
    rows = torch.bincount(places // shape[1], minlength=shape[0])
    assert rows.max() - rows.min() <= 2
    halves = (places % shape[1] < shape[1] / 2).double().mean().item()
    assert halves == pytest.approx(0.5, abs=0.06)


def test_bracket_that_misses_falls_back(monkeypatch):
    """All entries of the sample are zero although most entries are not."""
    monkeypatch.setattr(outliers, "_LARGE", 1)
    outside = gaussian(1, 1000)
    chosen = outliers._spread(torch.arange(1000).float(), 1000 // 32).long()
    outside[0, chosen] = 0.0
    torch.testing.assert_close(clip_outliers(outside).double(), reference(outside, 0.9), rtol=1e-6, atol=0)


def test_more_entries_than_torch_quantile_takes():
    x = torch.arange(2**24 + 2).float().view(2, -1)  # exact in float32 up to 2**24, even beyond
    with pytest.raises(RuntimeError, match="too large"):
        x.quantile(0.9)
    clipped = clip_outliers(x, 0.5)
    assert clipped.max().item() == pytest.approx((2**24 + 1) / 2)


def test_gradient_flows_through_what_is_kept():
    x = gaussian(9, 8).requires_grad_()
    clipped = clip_outliers(x)
    clipped.sum().backward()
    assert torch.equal(x.grad, (clipped == x).float())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_compiles_and_runs_without_values(device):
    torch._dynamo.reset()
    compiled = torch.compile(clip_outliers, fullgraph=True, backend="aot_eager")
    x = gaussian(30, 20).to(device)
    out = compiled(x, 0.9)
    if device == "cpu":
        assert torch.equal(out, clip_outliers(x, 0.9))
    assert clip_outliers(x, 0.9).shape == x.shape


@pytest.mark.parametrize(
    ("x", "options", "error", "words"),
    [
        (torch.ones(2, 2), {"q": 0.0}, ValueError, "q must be in"),
        (torch.ones(2, 2), {"q": 1.5}, ValueError, "q must be in"),
        (torch.ones(2, 2), {"q": math.nan}, ValueError, "q must be in"),
        (torch.ones(2, 2), {"sample": 0}, ValueError, "sample"),
        (torch.ones(()), {}, ValueError, "0-dimensional"),
        (torch.ones(2, 2, dtype=torch.cfloat), {}, TypeError, "complex64"),
        (torch.ones(2, 2, dtype=torch.long), {}, TypeError, "int64"),
    ],
)
def test_bad_input(x, options, error, words):
    with pytest.raises(error, match=words):
        clip_outliers(x, **options)
