import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.inspect import erg_count


def exact(values):
    """The count by products of fractions, which neither overflow nor underflow."""
    values = sorted((Fraction(value) for value in values), reverse=True)
    mean, product = sum(values) / len(values), Fraction(1)
    for k, value in enumerate(values, 1):
        product *= value / mean
        if product < 1:
            return k
    return len(values)


def test_by_hand():
    # 4, 1, 1/4 have the mean 7/4: 16/7, then 64/49, then 64/343.
    k, eigenvalue, logdet = erg_count(torch.tensor([0.25, 4.0, 1.0]))
    assert (k, eigenvalue) == (3, 0.25)
    assert logdet == pytest.approx(math.log(64 / 343))
    # 9, 1, 1, 1 have the mean 3: 3, then 1 (not below), then 1/3.
    assert erg_count(torch.tensor([9.0, 1.0, 1.0, 1.0]))[:2] == (3, 1.0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(-20, 20))
def test_equals_exact_products_at_any_scale(values, exponent):
    evals = torch.tensor(values, dtype=torch.float64)
    found = erg_count(evals * 2.0**exponent)
    assert found.k == exact(values)
    assert found.eigenvalue == sorted(values, reverse=True)[found.k - 1] * 2.0**exponent


def test_products_beyond_float64():
    # 1200 eigenvalues of 3: their product is 3 ** 1200 before the 0.5s bring it down again.
    evals = torch.cat([torch.full((1200,), 3.0), torch.full((4800,), 0.5)]).double()
    values = evals.tolist()
    mean = sum(values) / len(values)
    assert 1200 * math.log(3 / mean) > math.log(torch.finfo(torch.float64).max)
    up, down = 1200 * math.log(3.0), math.log(0.5)
    expected = next(k for k in range(1201, 6001) if up + (k - 1200) * down - k * math.log(mean) < 0)
    assert erg_count(evals).k == expected
    assert math.isinf(math.prod(value / mean for value in values[:1200]))


def test_equal_eigenvalues_multiply_to_one():
    for n in (1, 2, 7, 1000):
        k, eigenvalue, logdet = erg_count(torch.full((n,), 0.1))
        assert (k, eigenvalue) == (n, pytest.approx(0.1))
        assert abs(logdet) < 1e-9


def test_zeros():
    assert erg_count(torch.tensor([0.0, 0.0, 1.0, 1.0])).k == 3
    k, eigenvalue, logdet = erg_count(torch.zeros(5))
    assert k == 0
    assert math.isnan(eigenvalue)
    assert math.isnan(logdet)


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        (torch.empty(0), r"shape \(0,\)"),
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        (torch.tensor([1.0, math.nan]), "NaN"),
        (torch.tensor([1.0, -1.0]), "negative"),
    ],
)
def test_bad_input(evals, message):
    with pytest.raises(ValueError, match=message):
        erg_count(evals)
