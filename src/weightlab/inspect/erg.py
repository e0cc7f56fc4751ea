"""The trace-log (ERG) condition: how many of the largest eigenvalues multiply to one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ErgCount(NamedTuple):
    """Where the product of the largest eigenvalues falls below one.

    Attributes:
        k: Number of eigenvalues up to and with the one that takes the product below one; all of them if none does;
            0 for a zero matrix.
        eigenvalue: The k-th largest eigenvalue, as it was given.
        logdet: Logarithm of the product of the k largest, rescaled.
    """

    k: int
    eigenvalue: float
    logdet: float


def erg_count(evals: Tensor) -> ErgCount:
    """Count the largest eigenvalues whose product is about one, after rescaling all to a mean of one.

    The scan runs from the largest down and stops at the first product below one. It adds logarithms, so that
    spectra of any width are counted right; WeightWatcher 0.7.7 multiplies, and beyond about 2048 eigenvalues its product
    can run out of the range of float64, which ends its scan too early or too late. Up to there the counts are equal, but
    for spectra without a crossing above the smallest eigenvalue.

    A result independent of the power-law fit: in an ideal layer by the theory (α = 2) both tails are the same.

    Args:
        evals: Eigenvalues, shape `(n,)`, n ≥ 1, any order, not below 0. Zeros count as the least positive number.

    Returns:
        The count, the eigenvalue and the log-determinant. Equal eigenvalues have k = n and a log-determinant of 0.

    Raises:
        ValueError: If `evals` is no vector, empty, or holds NaN, infinity or a negative number.

    References:
        SETOL: A Semi-Empirical Theory of (Deep) Learning, arXiv 2507.17912.

    Example:
        >>> erg_count(torch.tensor([4.0, 1.0, 0.25]))  # rescaled by 4/7: 2.29, 1.31, 0.19
        ErgCount(k=3, eigenvalue=0.25, logdet=-1.67...)
    """
    if evals.ndim != 1 or len(evals) == 0:
        raise ValueError(f"evals must be a vector of eigenvalues, got shape {tuple(evals.shape)}")
    if not bool(((evals >= 0) & evals.isfinite()).all()):
        raise ValueError(
            "evals holds NaN, infinity or negative numbers; eigenvalues of a Gram matrix have none"
        )
    x = evals.detach().double().sort(descending=True).values
    if float(x[0]) == 0:
        return ErgCount(0, math.nan, math.nan)
    # Relative to the largest first: the sum of all could overflow, the mean of the rest vanish.
    relative = x / x[0]
    logs = (relative.clamp_min(torch.finfo(torch.float64).tiny) / relative.mean()).log()
    products = logs.cumsum(0)
    # Sums within rounding of 0 are those of equal eigenvalues.
    below = (products < -1e-12 * len(x)).nonzero()
    index = int(below[0]) if len(below) else len(x) - 1
    return ErgCount(index + 1, float(x[index]), float(products[index]))
