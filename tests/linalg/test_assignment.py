from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightlab.linalg import assignment, linear_assignment


@pytest.fixture(autouse=True, scope="module", params=[2, 128])
def large(request: pytest.FixtureRequest):
    """Bid for small matrices, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "_LARGE", request.param)
        yield


def optimum(similarity: Tensor) -> float:
    values = similarity.double().numpy()
    return float(values[linear_sum_assignment(values, maximize=True)].sum())


def total(similarity: Tensor, columns: Tensor) -> float:
    assert torch.equal(columns.sort().values, torch.arange(len(similarity)))
    return float(similarity.double().gather(1, columns[:, None]).sum())


def shaped(n: int, seed: int) -> dict[str, Tensor]:
    """Similarities as they come: of noise, of few features, almost a permutation, of equal and of few values."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    features = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(n, generator=generator)
    return {
        "noise": noise,
        "features": features @ features[order].T,
        "negative": -noise.exp(),
        "permutation": torch.eye(n, dtype=torch.float64)[order] + 0.4 * noise,
        "equal": torch.ones(n, n, dtype=torch.float64),
        "few values": noise.round(),
    }


@pytest.mark.parametrize("kind", shaped(2, 0))
@pytest.mark.parametrize("n", [1, 2, 7, 60, 150])
def test_sum_is_the_largest(kind: str, n: int):
    similarity = shaped(n, n)[kind]
    found = linear_assignment(similarity)
    assert total(similarity, found.columns) == pytest.approx(optimum(similarity), rel=1e-12)
    assert found.columns.dtype == torch.int64
    assert found.prices.shape == (n,)


@pytest.mark.parametrize("seed", range(5))
def test_sum_is_the_largest_of_all_permutations(seed: int):
    similarity = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = max(total(similarity, torch.tensor(p)) for p in itertools.permutations(range(5)))
    assert total(similarity, linear_assignment(similarity).columns) == pytest.approx(best)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 9).map(lambda n: (n, n)), elements=st.floats(-1e3, 1e3, width=16)),
    st.floats(0, 1e3),
    st.randoms(use_true_random=False),
)
def test_prices_never_change_the_sum(values: np.ndarray, scale: float, random):
    similarity = torch.from_numpy(values)
    prices = torch.tensor([random.uniform(-scale, scale) for _ in values], dtype=torch.float64)
    found = linear_assignment(similarity, prices)
    assert total(similarity, found.columns) == pytest.approx(optimum(similarity), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("kind", ["noise", "features", "permutation"])
def test_prices_of_a_similar_problem_serve(kind: str):
    similarity = shaped(90, 3)[kind]
    near = similarity + 0.05 * shaped(90, 4)["noise"]
    found = linear_assignment(near, linear_assignment(similarity).prices)
    assert total(near, found.columns) == pytest.approx(optimum(near), rel=1e-12)


def test_columns_of_their_own_need_no_solver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assignment, "linear_sum_assignment", None)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    similarity = torch.eye(50)[order] + 0.3 * torch.rand(50, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear_assignment(similarity).columns, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_and_strides(dtype: torch.dtype):
    similarity = (20 * shaped(40, 0)["noise"]).to(dtype).T
    before = similarity.clone()
    found = linear_assignment(similarity)
    assert total(similarity, found.columns) == pytest.approx(optimum(similarity), rel=1e-6)
    assert torch.equal(similarity, before)


def test_prices_are_not_written_to():
    similarity = shaped(20, 0)["noise"]
    prices = torch.zeros(20, dtype=torch.float64)
    linear_assignment(similarity, prices)
    assert not prices.any()


def test_nothing_to_assign():
    found = linear_assignment(torch.zeros(0, 0))
    assert (found.columns.shape, found.prices.shape) == ((0,), (0,))


def test_bad_input():
    with pytest.raises(ValueError, match=r"similarity must be a square matrix, got shape \(2, 3\)"):
        linear_assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"prices must have shape \(2,\), one for each column, got \(3,\)"):
        linear_assignment(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="prices has entries that are not finite"):
        linear_assignment(torch.zeros(2, 2), torch.tensor([0.0, torch.nan]))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="similarity has entries that are not finite"):
            linear_assignment(torch.tensor([[0.0, bad], [0.0, 1.0]]))
