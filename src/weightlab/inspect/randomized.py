"""What a layer's spectrum would be if its entries lay at random: the control for everything read from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from weightlab.inspect.spectrum import ConvView, esd

Array = NDArray[np.float64]

# As WeightWatcher 0.7.7 has them: the density's kernel and grid, what counts as no density, and the range of the
# scale, relative to that for which the law ends at the largest eigenvalue.
_BANDWIDTH = 0.1
_POINTS = 1000
_LEAST_DENSITY = 0.01
_SCALES = np.arange(0.05, 2.0, 0.01)
# Spectra with fewer eigenvalues are taken over several shuffles.
_FEW = 100
_REPLICAS = 5
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class RandomizedControl(NamedTuple):
    """A layer beside itself with its entries shuffled.

    Attributes:
        max_eigenvalue: Largest eigenvalue over the shuffles.
        softrank: Largest eigenvalue of the first shuffle over that of the layer; about 1 for a random matrix.
        distance: Jensen-Shannon distance between the two sorted spectra, each divided by its sum. It is one of
            vectors, as WeightWatcher has it, not of densities.
        sigma_mp: Scale of the Marchenko-Pastur law fitted to the shuffles, with eigenvalues rescaled to a mean
            of one; NaN if none fits.
        bulk_max: Where that law ends, on the scale of the eigenvalues.
        n_traps: Eigenvalues of the first shuffle beyond that end and an allowance for its fluctuation: entries so
            large that they make a direction of their own wherever they are ("correlation traps"). Slices of a kernel
            that differ in norm are counted as such, too.
    """

    max_eigenvalue: float
    softrank: float
    distance: float
    sigma_mp: float
    bulk_max: float
    n_traps: int


def randomized_control(
    weight: Tensor,
    *,
    conv: ConvView = "slices",
    seed: int = 0,
    evals: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> RandomizedControl:
    r"""Compare a layer with shuffles of its own entries, and fit a Marchenko-Pastur law to those.

    The density of the shuffled spectrum is estimated once, by a triangular kernel of half-width 0.1; then the scale s
    of the law is searched for the least squared difference on a grid and refined. Traps lie beyond
    :math:`\lambda^+ + \sqrt{Q^{-1/2} (\lambda^+)^{2/3} M^{-2/3}}` with :math:`\lambda^+ = s^2 (1 + Q^{-1/2})^2` for
    matrices N×M, Q = N/M ≥ 1. For square matrices the law of the singular values is fitted instead.

    Args:
        weight: Shape `(out, in)` or `(out, in, *kernel)`. Entries of a kernel's slices are shuffled within each.
        conv: How a kernel is made matrices; see [`esd`][weightlab.inspect.esd].
        seed: Seed of the shuffles, of which there are 5 with fewer than 100 eigenvalues, else 1.
        evals: The layer's own eigenvalues, if they are at hand, as from `esd` with the same `conv`.
        dtype: Type to compute the shuffles' eigenvalues in, float32 (default) or float64. Another seed changes them
            by far more than float32 does. The layer's own are computed in float64.

    Returns:
        The comparison; NaN and no traps for a zero weight.

    Raises:
        TypeError: If `weight` is not floating point.
        ValueError: As for `esd`.

    Complexity:
        That of `esd` for each shuffle; the fit adds `195 · 1000` operations and a sort.

    References:
        SETOL: A Semi-Empirical Theory of (Deep) Learning, arXiv 2507.17912. Where the code for square matrices
        keeps the quarter circle's radius at 2 whatever the scale, this one scales it.

    Example:
        >>> W = torch.randn(60, 120, generator=torch.Generator().manual_seed(0))
        >>> W[3, 4] = 100.0
        >>> control = randomized_control(W)
        >>> control.n_traps, round(control.softrank, 2)
        (1, 1.0)
    """
    own = esd(weight, conv=conv) if evals is None else evals
    if float(own[-1]) == 0:
        return RandomizedControl(*[math.nan] * 5, n_traps=0)
    generator = np.random.default_rng(seed)
    # A power of two, so that nothing is rounded, for squares in the range of float32.
    unit = 2.0 ** math.frexp(float(torch.stack(weight.aminmax()).double().abs().max()))[1]
    spectra = [
        esd(_shuffled(weight, conv, generator).div_(unit), conv=conv, dtype=dtype).double() * unit**2
        for _ in range(_REPLICAS if len(own) < _FEW else 1)
    ]
    first = spectra[0]
    pooled = torch.cat(spectra).sort().values.cpu().numpy()
    matrix = weight.shape[:2] if conv == "slices" else (weight.shape[0], weight[0].numel())
    longer, shorter = max(matrix), min(matrix)
    scale = float(pooled.mean())
    sigma = _marchenko_pastur_scale(pooled / scale, longer / shorter)
    bulk_max = (sigma * (1 + math.sqrt(shorter / longer))) ** 2
    edge = bulk_max + math.sqrt(math.sqrt(shorter / longer) * (bulk_max / shorter) ** (2 / 3))
    return RandomizedControl(
        max_eigenvalue=float(pooled[-1]),
        softrank=float(first[-1]) / float(own[-1]),
        distance=_jensen_shannon(own.double(), first),
        sigma_mp=sigma,
        bulk_max=bulk_max * scale,
        n_traps=int((first > edge * scale).sum()),
    )


@torch.no_grad()
def _shuffled(weight: Tensor, conv: ConvView, generator: np.random.Generator) -> Tensor:
    """A copy with its entries in random order, or those of each slice of a kernel."""
    positions = weight[0, 0].numel() if conv == "slices" else 1
    columns = weight.reshape(-1, positions).mT.to("cpu", copy=True, memory_format=torch.contiguous_format)
    # NumPy has no bfloat16, but moves integers of its size alike.
    bits = columns.view(_INTEGERS[columns.itemsize]).numpy()
    for column in bits:
        generator.shuffle(column)
    return columns.mT.reshape(weight.shape).to(weight.device)


def _jensen_shannon(p: Tensor, q: Tensor) -> float:
    p, q = p / p.sum(), q / q.sum()
    mean = ((p + q) / 2).clamp_min(torch.finfo(torch.float64).tiny)
    divergence = (torch.special.xlogy(p, p / mean) + torch.special.xlogy(q, q / mean)).sum() / 2
    return math.sqrt(max(float(divergence), 0.0))


def _triangular_density(values: Array, points: Array) -> Array:
    """Density of sorted values by a triangular kernel, from running sums: no pair is looked at."""
    h, n = _BANDWIDTH, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, middle, high = (np.searchsorted(values, points + shift) for shift in (-h, 0.0, h))
    left = (middle - low) * (h - points) + sums[middle] - sums[low]
    right = (high - middle) * (h + points) - (sums[high] - sums[middle])
    return (left + right) / (n * h * h)


def _law(points: Array, s: Array, Q: float) -> tuple[Array, Array, Array]:
    """Marchenko-Pastur density, for each scale, of eigenvalues or, for Q = 1, of singular values; and its ends."""
    if Q == 1:
        top = 2 * s
        return np.sqrt(np.maximum(top**2 - points**2, 0)) / (math.pi * s**2), 0 * top, top
    top, bottom = (s * (1 + Q**-0.5)) ** 2, (s * (1 - Q**-0.5)) ** 2
    inside = np.maximum((top - points) * (points - bottom), 0)
    return np.sqrt(inside) * Q / (2 * math.pi * s**2 * points), bottom, top


def _marchenko_pastur_scale(values: Array, Q: float) -> float:
    """Scale for which the law is nearest to the density of values with a mean of one; NaN if none can be."""
    reach = math.sqrt(values[-1]) / (1 + Q**-0.5)
    fitted = np.sqrt(values) if Q == 1 else values
    points = np.linspace(0, fitted[-1] + 0.5, _POINTS)
    density = _triangular_density(fitted, points)
    kept = (density > _LEAST_DENSITY) & (points > 0)
    if not kept.any():
        return math.nan
    points, density = points[kept], density[kept]
    mode = points[density.argmax()]

    def loss(s: Array) -> Array:
        law, bottom, top = _law(points, s[:, None], Q)
        squared = ((law - density) ** 2).sum(1)
        # A law that ends below the mode, starts above it or ends beyond all points is no candidate.
        possible = (top[:, 0] >= mode) & (bottom[:, 0] <= mode) & ((top[:, 0] <= points[-1]) | (Q == 1))
        return np.where(possible, squared, np.inf)

    scales = reach * _SCALES
    losses = loss(scales)
    best = int(losses.argmin())
    if not np.isfinite(losses[best]):
        return math.nan
    around = (scales[max(best - 1, 0)], scales[min(best + 1, len(scales) - 1)])
    refined = minimize_scalar(
        lambda s: float(min(loss(np.array([s]))[0], 1e12)), bounds=around, method="bounded"
    )
    return float(refined.x if refined.fun < losses[best] else scales[best])
