"""A spectrum in a few dozen numbers: enough to draw it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS = 48
# Eigenvalues this far below the largest are counted, not drawn: unless something is to be seen there, and then
# still down to the second.
_DEPTH, _DEEPEST = 1e-4, 1e-8


@dataclass(frozen=True)
class BinnedSpectrum:
    """Eigenvalues counted in bins of equal width in their logarithm.

    Attributes:
        low: Lower end of the first bin.
        high: Upper end of the last bin; the largest eigenvalue, but for equal ones.
        counts: Number in each bin; empty if all eigenvalues are zero.
        below: Number under `low`.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    below: int = 0

    @property
    def edges(self) -> list[float]:
        """Ends of the bins, ascending, one more than there are bins."""
        if not self.counts:
            return []
        step = math.log(self.high / self.low) / len(self.counts)
        return [self.low * math.exp(step * index) for index in range(len(self.counts))] + [self.high]

    @property
    def density(self) -> list[float]:
        """Share of all eigenvalues per unit of λ, for each bin."""
        n = sum(self.counts) + self.below
        edges = self.edges
        return [
            count / (n * (right - left))
            for count, left, right in zip(self.counts, edges[:-1], edges[1:], strict=True)
        ]


def bin_spectrum(evals: Tensor | Sequence[float], down_to: float = math.inf) -> BinnedSpectrum:
    """Count eigenvalues in up to 48 bins, down to 1e-4 of the largest.

    Args:
        evals: Shape `(n,)`, any order, not below 0.
        down_to: An eigenvalue that the bins are to include, if it is not under 1e-8 of the largest.

    Example:
        >>> spectrum = bin_spectrum(torch.tensor([1.0, 2.0, 4.0, 0.0]))
        >>> spectrum.low, spectrum.high, spectrum.counts, spectrum.below
        (1.0, 4.0, (1, 0, 1, 1), 1)
    """
    x = torch.as_tensor(evals, dtype=torch.float64)
    high = float(x.max()) if len(x) else 0.0
    # Numbers near the least that there are have no logarithm to speak of.
    if high * _DEEPEST < torch.finfo(torch.float64).tiny:
        return BinnedSpectrum(0.0, 0.0, (), len(x))
    drawn = x[x >= max(_DEEPEST * high, min(_DEPTH * high, down_to))]
    low = float(drawn.min())
    if high <= 1.001 * low:
        return BinnedSpectrum(low / 1.1, high * 1.1, (len(drawn),), len(x) - len(drawn))
    bins = min(_BINS, math.ceil(2 * math.sqrt(len(drawn))))
    places = ((drawn / low).log() * (bins / math.log(high / low))).long().clamp_(0, bins - 1)
    counts = torch.bincount(places, minlength=bins)
    return BinnedSpectrum(low, high, tuple(counts.tolist()), len(x) - len(drawn))
