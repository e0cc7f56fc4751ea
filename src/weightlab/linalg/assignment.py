"""The linear assignment problem: which column for each row makes the sum of the chosen entries largest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Rounds of bidding that leave the solver least to do for what they cost, on similarities of trained layers.
_ROUNDS = 10
# Below this size the solver is faster than the bids; one round finds out whether it is needed.
_LARGE = 128


class Assignment(NamedTuple):
    """A solved assignment: for each row its column, and for each column its price.

    Prices need not be those of the optimum: they say where to begin with a similar problem.
    """

    columns: Tensor
    prices: Tensor


def linear_assignment(similarity: Tensor, prices: Tensor | None = None) -> Assignment:
    """Find the permutation p with the largest sum of ``similarity[i, p[i]]``.

    Rows bid for columns first, in an auction of a few rounds done for all rows at once. If every row gets
    one, as where the largest entries of rows lie in columns of their own, the result is optimal by linear duality. If
    not, prices of columns are known well enough to make the exact solver of SciPy fast, and better still if
    they begin at those of a similar problem.

    Args:
        similarity: Square matrix, finite, on any device. Bids are made in float32, float64 for float64 and integers.
        prices: Where to begin, of shape (n,): what a similar problem returned. Default None: 0. They change the time
            that it takes, and the sum within rounding of the bids at most.

    Returns:
        Indices, int64 of shape (n,), and prices, (n,), on the CPU.

    Raises:
        ValueError: If the matrix is not square, `prices` has another length, or either has an entry that is not finite.

    Complexity:
        O(n³) at worst, O(n²) where the auction is enough. Memory: a copy in float64.

    Reference:
        Bertsekas, "The auction algorithm" (1988), for the rounds before the exact solver.

    Example:
        >>> linear_assignment(torch.tensor([[1.0, 3.0], [2.0, 4.1]])).columns.tolist()
        [0, 1]
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"similarity must be a square matrix, got shape {tuple(similarity.shape)}")
    n = len(similarity)
    if prices is not None and prices.shape != (n,):
        raise ValueError(f"prices must have shape ({n},), one for each column, got {tuple(prices.shape)}")
    exact = similarity.dtype == torch.float64 or not similarity.is_floating_point()
    values = similarity.detach().to("cpu", torch.float64 if exact else torch.float32).numpy()
    if n and not (np.isfinite(values.max()) and np.isfinite(values.min())):
        raise ValueError("similarity has entries that are not finite")
    start = np.zeros(n) if prices is None else prices.double().numpy(force=True)
    if not np.isfinite(start).all():
        raise ValueError("prices has entries that are not finite")
    columns, found = _auction(values, start.astype(values.dtype))
    if (columns < 0).any():
        # No row's and no column's own constant changes the solution; without them it is found sooner.
        costs = np.subtract(values, found, dtype=np.float64)
        np.subtract(costs.max(1, keepdims=True), costs, out=costs)
        costs -= costs.min(0)
        columns = linear_sum_assignment(costs)[1]
    return Assignment(torch.from_numpy(columns), torch.from_numpy(found))


def _auction(values: NDArray, prices: NDArray) -> tuple[NDArray, NDArray]:
    """Columns of rows, -1 for those that got none, and prices at which each row has a column that it likes best."""
    n = len(values)
    prices, order = prices.copy(), np.arange(n)
    columns, owner = np.full(n, -1), np.full(n, -1)
    free, few = order, n // 64
    for _ in range(_ROUNDS if n >= _LARGE else min(1, n - 1)):
        gains = (values if len(free) == n else values[free]) - prices
        wanted = gains.argmax(1)
        places = order[: len(free)], wanted
        best = gains[places]
        gains[places] = -np.inf
        # A row bids as much as leaves the column as good as its next best.
        bids = prices[wanted] + (best - gains.max(1))
        winner = np.full(n, -1)
        ascending = bids.argsort(kind="stable")
        winner[wanted[ascending]] = ascending  # the last written is the highest
        sold = (winner >= 0).nonzero()[0]
        winner = winner[sold]
        losers = owner[sold]
        columns[losers[losers >= 0]] = -1
        owner[sold] = free[winner]
        columns[free[winner]] = sold
        prices[sold] = bids[winner]
        free = (columns < 0).nonzero()[0]
        if len(free) <= few:
            break
    return columns, prices
