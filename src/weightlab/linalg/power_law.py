"""Power-law tails: the exponent for every possible start of the tail, and how far from a power law each is."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

SmallN = Literal["bias_corrected", "plain"]

# Entries of the triangle of deviations held at a time.
_BLOCK = 1 << 16
# Fewer values than this are fitted by the rule for small samples, over tails of at least so many.
_SMALL = 20
_SMALL_TAIL = 8


class PowerLawScan(NamedTuple):
    """A fit for every candidate start of the tail.

    Attributes:
        alphas: Exponent of the tail from each value on, shape `(..., n − 1)`; 0 where none was tried.
        ks: Kolmogorov-Smirnov distance of the tail from that power law, shape `(..., n − 1)`; 1 where none was
            tried, where the tail's values are all equal, or where the exponent is not above 1.
    """

    alphas: Tensor
    ks: Tensor


@torch.no_grad()
def power_law_scan(x: Tensor, small_n: SmallN = "bias_corrected") -> PowerLawScan:
    r"""Maximum-likelihood exponents and distances of a continuous power law, for every start of the tail.

    With :math:`m = n - i` values in the tail from :math:`x_i` on,

    .. math:: \alpha_i = 1 + m \Big/ \sum_{j \ge i} \ln \frac{x_j}{x_i}, \qquad
        D_i = \max_{j \ge i} \left| 1 - (x_j / x_i)^{1 - \alpha_i} - \frac{j - i}{m} \right|.

    The tail to report starts at the first minimum of D.

    Args:
        x: Shape `(..., n)`, n ≥ 2, positive and ascending. Rows are independent: a row of a batch has exactly
            the result that it has alone.
        small_n: What to do with fewer than 20 values. `"bias_corrected"` (default, as WeightWatcher 0.7.7 does): m − 1
            in the numerator of the exponent, and no tail of fewer than 8 values (or of fewer than n, if n is
            less). `"plain"`: the formula above.

    Returns:
        Exponents and distances, float64.

    Raises:
        ValueError: If x is too short, not positive, not ascending, or `small_n` is unknown.

    Complexity:
        `n²/2` exponentials a row, in blocks that fit into a processor's cache; no loop over candidates.

    References:
        Power-law distributions in empirical data, arXiv 0706.1062. WeightWatcher 0.7.7 for the one-sided empirical
        distribution and the rule for small samples.

    Example:
        >>> n = 400  # quantiles of the power law with exponent 2.5 above 1
        >>> x = (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** (-1 / 1.5)
        >>> scan = power_law_scan(x)
        >>> i = int(scan.ks.argmin())
        >>> i, round(float(scan.alphas[i]), 2)
        (0, 2.5)
    """
    if small_n not in ("bias_corrected", "plain"):
        raise ValueError(f'small_n must be "bias_corrected" or "plain", got {small_n!r}')
    if x.ndim < 1 or x.size(-1) < 2:
        raise ValueError(f"power_law_scan needs at least two values a row, got shape {tuple(x.shape)}")
    if not bool((x[..., 0] > 0).all() and (x.diff(dim=-1) >= 0).all() and x[..., -1].isfinite().all()):
        raise ValueError(
            "power_law_scan needs positive, finite values in ascending order; sort and filter x first"
        )
    batch, n = x.shape[:-1], x.size(-1)
    logs = x.double().reshape(-1, n).contiguous().log()
    small = small_n == "bias_corrected" and n < _SMALL
    sizes = torch.arange(n, 1, -1, dtype=torch.float64, device=x.device)
    tails = logs.flip(-1).cumsum(-1).flip(-1)[:, :-1] - sizes * logs[:, :-1]
    # Sums over equal values are rounding errors.
    tried = tails > 1e-12
    if small:
        tried &= sizes >= min(_SMALL_TAIL, n)
    alphas = torch.where(tried, 1 + (sizes - int(small)) / tails.clamp_min(1e-12), 0.0)
    ks = torch.where(tried, _distances(logs, alphas), 1.0)
    return PowerLawScan(alphas.reshape(*batch, n - 1), ks.reshape(*batch, n - 1))


def _distances(logs: Tensor, alphas: Tensor) -> Tensor:
    """D of each tail: the largest entry of each row of a triangle, computed in strips of rows."""
    rows, n = logs.shape
    distances = torch.ones_like(alphas)
    positions = torch.arange(n, dtype=logs.dtype, device=logs.device)
    start = 0
    while start < n - 1:
        stop = min(n - 1, start + max(1, _BLOCK // (rows * (n - start))))
        first, column = positions[start:stop], positions[start:]
        # The exponential is one minus the fitted distribution; add the empirical one, less one.
        strip = logs[:, None, start:] - logs[:, start:stop, None]
        strip *= (1 - alphas[:, start:stop, None]).clamp_max(0)
        strip.exp_().add_((column - n) / (n - first[:, None])).abs_()
        # Left of the diagonal is no tail.
        strip.triu_()
        distances[:, start:stop] = strip.amax(-1)
        start = stop
    return torch.where(alphas > 1, distances, 1.0)
