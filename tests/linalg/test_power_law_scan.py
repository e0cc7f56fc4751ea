import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import power_law, power_law_scan


def reference(x, bias_corrected=True):
    """The published rule, candidate by candidate in float64."""
    x = x.double().numpy()
    n = len(x)
    small = bias_corrected and n < 20
    alphas, ks = np.zeros(n - 1), np.ones(n - 1)
    for i in range(n - 1):
        tail, m = x[i:], n - i
        total = np.log(tail / tail[0]).sum()
        if total <= 1e-12 or (small and m < min(8, n)):
            continue
        alphas[i] = 1 + (m - small) / total
        if alphas[i] > 1:
            ks[i] = np.abs(1 - (tail / tail[0]) ** (1 - alphas[i]) - np.arange(m) / m).max()
    return torch.from_numpy(alphas), torch.from_numpy(ks)


def spectrum(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64).mul(1.5).exp().sort().values


@pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 19, 20, 21, 150])
@pytest.mark.parametrize("block", [1, 333, 1 << 20])
def test_equals_the_published_rule(n, block, monkeypatch):
    monkeypatch.setattr(power_law, "_BLOCK", block)
    x = spectrum(n, seed=n)
    for small_n in ("bias_corrected", "plain"):
        scan = power_law_scan(x, small_n)
        alphas, ks = reference(x, small_n == "bias_corrected")
        torch.testing.assert_close(scan.alphas, alphas, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scan.ks, ks, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [5, 19, 64, 130])
def test_a_row_of_a_batch_is_what_it_is_alone(n):
    x = torch.stack([spectrum(n, seed) for seed in range(6)]).reshape(2, 3, n)
    scan = power_law_scan(x)
    assert scan.ks.shape == (2, 3, n - 1)
    for a in range(2):
        for b in range(3):
            alone = power_law_scan(x[a, b])
            assert torch.equal(scan.alphas[a, b], alone.alphas)
            assert torch.equal(scan.ks[a, b], alone.ks)


@pytest.mark.parametrize(("alpha", "tolerance"), [(1.8, 0.01), (2.5, 0.01), (4.0, 0.02)])
def test_recovers_the_exponent_from_exact_quantiles(alpha, tolerance):
    n = 400
    x = 3.0 * (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / (alpha - 1))
    scan = power_law_scan(x)
    best = int(scan.ks.argmin())
    assert best == 0
    assert abs(float(scan.alphas[best]) - alpha) < tolerance


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 40), st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_scale_free(n, seed, scale):
    x = spectrum(n, seed)
    plain, scaled = power_law_scan(x), power_law_scan(x * scale)
    torch.testing.assert_close(scaled.alphas, plain.alphas, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled.ks, plain.ks, rtol=1e-7, atol=1e-9)


def test_equal_values_are_no_tail():
    scan = power_law_scan(torch.full((30,), 2.0))
    assert (scan.ks == 1).all()
    assert (scan.alphas == 0).all()
    partly = power_law_scan(torch.cat([spectrum(25), torch.full((5,), 1e6)]))
    assert (partly.ks[25:] == 1).all()
    assert (partly.ks[:25] < 1).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([1.0]), r"got shape \(1,\)"),
        (torch.tensor([0.0, 1.0]), "positive, finite"),
        (torch.tensor([2.0, 1.0]), "ascending"),
        (torch.tensor([1.0, float("nan")]), "finite"),
        (torch.tensor([1.0, float("inf")]), "finite"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        power_law_scan(x)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="small_n must be"):
        power_law_scan(torch.tensor([1.0, 2.0]), "other")  # type: ignore[arg-type]
