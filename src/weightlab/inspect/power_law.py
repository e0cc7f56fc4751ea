"""Fitting a power law to the tail of a spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weightlab.linalg.power_law import SmallN, power_law_scan


@dataclass(frozen=True)
class PowerLawFit:
    """A power law ρ(λ) ~ λ^−α for the eigenvalues from `xmin` on.

    Attributes:
        alpha: Exponent; NaN unless `status` is `"ok"`, as all numbers below.
        xmin: Where the tail starts: one of the eigenvalues, or what was asked for.
        xmax: Largest eigenvalue.
        ks: Kolmogorov-Smirnov distance between the tail and the law.
        sigma: Standard error of `alpha` for an exact power law, (α − 1)/√n. It knows nothing of the choice of `xmin`.
        n_tail: Number of eigenvalues of at least `xmin`; 0 without a fit.
        status: `"ok"`, `"too few"` (under two eigenvalues above the threshold, or from `xmin` on) or
            `"degenerate"` (no tail has an exponent, because its eigenvalues are equal).
        alphas: Exponent for every candidate start of the tail, ascending; empty if none was tried.
        ks_all: Distance for every candidate.
    """

    alpha: float
    xmin: float
    xmax: float
    ks: float
    sigma: float
    n_tail: int
    status: str = "ok"
    alphas: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    ks_all: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)


def fit_power_law(
    evals: Tensor,
    *,
    threshold: float = 1e-5,
    xmin: float | None = None,
    small_n: SmallN = "bias_corrected",
) -> PowerLawFit:
    """Fit a power law to the tail of a spectrum, by maximum likelihood over every possible start of the tail.

    α, D, xmin and the number in the tail are those of WeightWatcher 0.7.7 with its defaults.

    Args:
        evals: Eigenvalues, shape `(n,)`, any order, not below 0.
        threshold: Eigenvalues up to this are left out (default: WeightWatcher's). It is absolute, so rescaled
            weights may have another fit if they have eigenvalues near it.
        xmin: Start of the tail. Default None: the eigenvalue for which the distance is least.
        small_n: Rule for fewer than 20 eigenvalues; see
            [`power_law_scan`][weightlab.linalg.power_law_scan].

    Returns:
        The fit. With too few eigenvalues or equal ones, its `status` says so and its numbers are NaN.

    Raises:
        ValueError: If `evals` is no vector, or holds NaN, infinity or a negative number; if `threshold` is
            negative, `xmin` not positive, or `small_n` unknown.

    Complexity:
        `n²/2` exponentials.

    References:
        SETOL: A Semi-Empirical Theory of (Deep) Learning, arXiv 2507.17912; Power-law distributions in empirical
        data, arXiv 0706.1062.

    Example:
        >>> n = 400  # quantiles of the power law with exponent 3 above 2
        >>> quantiles = 2 * (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / 2)
        >>> fit = fit_power_law(quantiles)
        >>> round(fit.alpha, 2), round(fit.xmin, 2), fit.n_tail
        (3.0, 2.0, 400)
        >>> fit_power_law(torch.ones(30)).status
        'degenerate'
    """
    if evals.ndim != 1:
        raise ValueError(f"evals must be a vector of eigenvalues, got shape {tuple(evals.shape)}")
    if not bool(((evals >= 0) & evals.isfinite()).all()):
        raise ValueError(
            "evals holds NaN, infinity or negative numbers; eigenvalues of a Gram matrix have none"
        )
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if xmin is not None and not xmin > 0:
        raise ValueError(f"xmin must be above 0, got {xmin}")
    if small_n not in ("bias_corrected", "plain"):
        raise ValueError(f'small_n must be "bias_corrected" or "plain", got {small_n!r}')
    x = evals.detach().double()
    x = x[x > threshold].sort().values
    if xmin is not None:
        x = x[x >= xmin]
    if len(x) < 2:
        return _none("too few")
    scan = power_law_scan(x, small_n)
    best = 0 if xmin is not None else int(scan.ks.argmin())
    alpha, ks = float(scan.alphas[best]), float(scan.ks[best])
    if not alpha > 1:
        return _none("degenerate")
    start = float(x[best])
    return PowerLawFit(
        alpha=alpha,
        xmin=start if xmin is None else xmin,
        xmax=float(x[-1]),
        ks=ks,
        sigma=(alpha - 1) / math.sqrt(len(x) - best),
        n_tail=int((x >= start).sum()),
        alphas=scan.alphas,
        ks_all=scan.ks,
    )


def _none(status: str) -> PowerLawFit:
    return PowerLawFit(*[math.nan] * 5, n_tail=0, status=status)
