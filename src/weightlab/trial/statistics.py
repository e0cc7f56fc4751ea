"""Statistics of paired comparisons: intervals, dual p-values, Holm's correction, verdicts, power.

All functions are pure: they take numbers, return numbers, and draw from a fixed seed where they draw
at all. `docs/protocol.md` says why each was chosen and how well it is calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtr, ndtri, stdtr, stdtrit

from weightlab.exceptions import TrialError, UsageError
from weightlab.trial.result import Verdict

BOOTSTRAP_FROM = 6
RESAMPLES = 9_999
SEED = 0
MOST_SEEDS = 10_000

Interval = tuple[float, float]


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int) -> NDArray[np.int64]:
    """Indices of the resamples, `(resamples, n)`: the same for all samples of one size."""
    return np.random.default_rng(SEED).integers(0, n, (resamples, n))


class _BCa:
    """Bootstrap distribution of a mean with its bias correction z0 and acceleration a.

    The end of the BCa interval for the normal quantile z is the bootstrap quantile at
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))); `z_of` inverts that. The numbers are those of
    `scipy.stats.bootstrap(method="BCa")`, without the cost of importing it. Reference:
    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), section 14.3.
    """

    def __init__(self, values: NDArray[np.float64], resamples: int) -> None:
        # Resampling one canonical arrangement makes the interval independent of the order of the
        # seeds, and mirrors it exactly when challenger and baseline swap roles.
        ascending, negated = np.sort(values), np.sort(-values)
        self._sign = -1.0 if negated.tolist() > ascending.tolist() else 1.0
        values = negated if self._sign < 0 else ascending
        drawn = values[_draws(values.size, resamples)].mean(axis=1)
        # Means that are equal but for rounding must tie, as they do on a metric counted in steps.
        scale = np.abs(values).max()
        self._means = np.sort(np.round(drawn / scale, 12) * scale)
        mean = np.round(values.mean() / scale, 12) * scale
        below = np.searchsorted(self._means, mean, "left") + np.searchsorted(self._means, mean, "right")
        self._z0 = float(ndtri(np.clip(below, 1, 2 * resamples - 1) / (2 * resamples)))
        deviations = values - values.mean()
        deviations /= np.abs(deviations).max()
        self._a = float((deviations**3).sum() / (deviations**2).sum() ** 1.5 / 6)

    def end(self, z: float) -> float:
        """Return the end of the interval at normal quantile `z` (negative: the lower end)."""
        w = self._z0 + self._sign * z
        slope = 1 - self._a * w
        # Past its pole the formula turns back; the end can only move outwards.
        rank = float(ndtr(self._z0 + w / slope)) if slope > 0 else float(w > 0)
        position = rank * (self._means.size - 1)
        index = min(int(position), self._means.size - 2)
        low, high = self._means[index], self._means[index + 1]
        return self._sign * float(low + (position - index) * (high - low))

    def z_of(self, threshold: float, *, lower: bool) -> float:
        """Return the normal quantile at which the lower (or the upper) end meets `threshold`."""
        means, threshold = self._means, self._sign * threshold
        if lower == (self._sign > 0):
            index = int(np.searchsorted(means, threshold, "right")) - 1
        else:
            index = int(np.searchsorted(means, threshold, "left")) - 1
        if 0 <= index < means.size - 1:
            step = means[index + 1] - means[index]
            position = index + float((threshold - means[index]) / step)
        else:
            position = 0.0 if index < 0 else means.size - 1.0
        w = float(ndtri(position / (means.size - 1))) - self._z0
        if math.isinf(w) or 1 + self._a * w <= 0:
            return self._sign * math.copysign(math.inf, w)
        return self._sign * (w / (1 + self._a * w) - self._z0)


class PairedMean:
    """The mean of paired differences, with intervals and the p-values dual to them.

    Under 6 values: the paired t interval. From 6 on, each end is the farther out of two: that of the
    BCa bootstrap, its nominal level widened by the small-sample expansion
    alpha' = Phi(-sqrt(n / (n - 1)) t_{alpha / 2, n - 1}) (Hesterberg, "What Teachers Should Know About
    the Bootstrap", 2015, arXiv:1411.5279), and that of the paired t. BCa alone, even widened, excludes
    zero up to several times too often below 15 values, because a bootstrap mean cannot leave the range
    of the data; t alone is blind to skewness.

    Special cases: one value gives (-inf, inf) and p-value 1; equal values d give [d, d]; values of
    which some are infinite give (-inf, inf) and p-value 1, unless all are the same infinity.

    Args:
        differences: At least one number, not NaN; ±inf stands for a comparison with a run that has no
            score at all.
        resamples: Bootstrap resamples.

    Raises:
        TrialError: When `differences` is empty, has more than one dimension, or holds a NaN.

    Complexity:
        O(resamples x n) once, O(log resamples) for each interval or p-value after that.

    Example:
        >>> estimate = PairedMean([0.1, 0.3, 0.2])
        >>> low, high = estimate.interval(0.95)
        >>> print(f"{estimate.mean:.2f} [{low:.3f}, {high:.3f}] by {estimate.method}")
        0.20 [-0.048, 0.448] by paired t
        >>> round(estimate.p_value(low), 6)
        0.05
    """

    def __init__(self, differences: Sequence[float], resamples: int = RESAMPLES) -> None:
        values = np.asarray(differences, dtype=np.float64)
        if values.ndim != 1 or values.size == 0 or np.isnan(values).any():
            raise TrialError(f"differences must be numbers, at least one and none NaN, not {differences}")
        self.values = values
        self.n = values.size
        self.method = "paired t" if self.n < BOOTSTRAP_FROM else "BCa bootstrap"
        self._resamples = resamples
        self._finite = bool(np.isfinite(values).all())
        constant = bool((values == values[0]).all())
        self.mean = float(values[0]) if constant else _mean(values)
        self.std = float(values.std(ddof=1)) if self.n > 1 and self._finite and not constant else 0.0
        self._constant = constant or (self._finite and self.std == 0)

    @cached_property
    def _bca(self) -> _BCa:
        return _BCa(self.values, self._resamples)

    def interval(self, level: float) -> Interval:
        """Return the two-sided interval of the mean at confidence `level`, in (0, 1)."""
        _check_level(level)
        if self.n == 1 or not (self._finite or self._constant):
            return -math.inf, math.inf
        if self._constant:
            return self.mean, self.mean
        t = -float(stdtrit(self.n - 1, (1 - level) / 2))
        reach = t * self.std / math.sqrt(self.n)
        low, high = self.mean - reach, self.mean + reach
        if self.n < BOOTSTRAP_FROM:
            return low, high
        z = t * math.sqrt(self.n / (self.n - 1))
        return min(low, self._bca.end(-z)), max(high, self._bca.end(z))

    def p_value(self, threshold: float) -> float:
        """Return the two-sided p-value of "the true mean is `threshold`".

        It is dual to `interval`: below alpha exactly when the interval at 1 - alpha excludes it.
        """
        if self.n == 1 or threshold == self.mean or not (self._finite or self._constant):
            return 1.0
        if self._constant:
            return 0.0
        t = abs(self.mean - threshold) / (self.std / math.sqrt(self.n))
        if self.n >= BOOTSTRAP_FROM:
            lower = threshold < self.mean
            z = self._bca.z_of(threshold, lower=lower) * (-1 if lower else 1)
            t = min(t, z * math.sqrt((self.n - 1) / self.n))
        return min(1.0, 2 * float(stdtr(self.n - 1, -t)))


def _mean(values: NDArray[np.float64]) -> float:
    if np.isposinf(values).any() and np.isneginf(values).any():
        return math.nan
    return float(values.mean())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level must lie between 0 and 1, e.g. 0.95, not {level}")


def paired_interval(differences: Sequence[float], level: float) -> tuple[float, float, str]:
    """Return low end, high end and method of `PairedMean`'s interval.

    Args:
        differences: Paired differences, one a seed.
        level: Confidence level in (0, 1).

    Example:
        >>> paired_interval([0.5], 0.95)
        (-inf, inf, 'paired t')
        >>> paired_interval([0.5, 0.5], 0.95)
        (0.5, 0.5, 'paired t')
    """
    estimate = PairedMean(differences)
    return *estimate.interval(level), estimate.method


def paired_p_value(differences: Sequence[float], threshold: float) -> float:
    """Return the two-sided p-value of "the true mean difference is `threshold`", dual to the interval.

    Example:
        >>> round(paired_p_value([1.0, 2.0, 3.0, 4.0], 0.0), 4)
        0.0305
    """
    return PairedMean(differences).p_value(threshold)


class HolmStep(NamedTuple):
    """What Holm's procedure leaves one of several tests: its adjusted p-value and its own alpha."""

    adjusted_p_value: float
    alpha: float


def holm(p_values: Mapping[str, float], alpha: float) -> dict[str, HolmStep]:
    """Correct several p-values by Holm's step-down procedure (1979), family-wise level `alpha`.

    The i-th smallest of m p-values (from 0) is tested at alpha / (m - i); from the first that fails
    on, all keep that first one's level, since the procedure stops there. Equal p-values share the
    stricter level. So an adjusted p-value is below `alpha` exactly when the p-value is below the alpha
    left to it, and the result does not depend on the order of the tests.

    Example:
        >>> for name, step in holm({"a": 0.01, "b": 0.04, "c": 0.03}, 0.05).items():
        ...     print(name, round(step.adjusted_p_value, 3), round(step.alpha, 4))
        a 0.03 0.0167
        b 0.06 0.025
        c 0.06 0.025
    """
    steps: dict[str, HolmStep] = {}
    adjusted, left = 0.0, None
    for name in sorted(p_values, key=lambda name: p_values[name]):
        p = p_values[name]
        remaining = sum(other >= p for other in p_values.values())
        adjusted = max(adjusted, min(1.0, remaining * p))
        steps[name] = HolmStep(adjusted, left or alpha / remaining)
        if left is None and p >= alpha / remaining:
            left = alpha / remaining
    return {name: steps[name] for name in p_values}


def decide(improvement: Interval, minimal_effect: float) -> Verdict:
    """Turn the interval of an improvement into a verdict on "better by at least the minimal effect".

    `"held"` when the whole interval lies above `minimal_effect`, `"not held"` when it lies wholly
    below, else `"inconclusive"`. Identical results (the interval [0, 0]) are therefore inconclusive
    when the minimal effect is 0 and do not hold when it is positive.

    Args:
        improvement: Low and high end, positive meaning better.
        minimal_effect: Smallest improvement worth claiming, >= 0.

    Example:
        >>> decide((0.1, 0.4), 0.05), decide((-0.3, 0.04), 0.05), decide((0.0, 0.0), 0.0)
        ('held', 'not held', 'inconclusive')
    """
    low, high = improvement
    if low > minimal_effect:
        return "held"
    if high < minimal_effect:
        return "not held"
    return "inconclusive"


def effect_size(improvements: Sequence[float]) -> float | None:
    """Return Cohen's d_z of paired improvements with Hedges' exact small-sample correction.

    d_z = mean / standard deviation, times J(n - 1) with
    J(v) = Gamma(v / 2) / (sqrt(v / 2) Gamma((v - 1) / 2)), which makes it unbiased under normality.

    Returns:
        The effect size; `None` for fewer than 3 values (no unbiased estimate exists), and for values
        that do not vary or are not finite.

    Example:
        >>> round(effect_size([1.0, 2.0, 3.0]), 4)
        1.1284
    """
    estimate = PairedMean(improvements)
    if estimate.n < 3 or estimate.std == 0:
        return None
    v = estimate.n - 1
    correction = math.exp(float(gammaln(v / 2) - gammaln((v - 1) / 2))) / math.sqrt(v / 2)
    return estimate.mean / estimate.std * correction


def win_rate(improvements: Sequence[float]) -> float:
    """Return the share of improvements above 0; a tie counts half.

    Example:
        >>> win_rate([0.2, 0.0, -0.1, 0.3])
        0.625
    """
    return float(np.mean([0.5 + 0.5 * float(np.sign(value)) for value in improvements]))


def seeds_needed(
    improvements: Sequence[float], minimal_effect: float, alpha: float, power: float = 0.8
) -> int | None:
    """Return how many seeds would settle an inconclusive comparison if mean and spread stayed as they are.

    The smallest n with n >= ((t_{1 - alpha / 2, n - 1} + t_{power, n - 1}) sd / |mean - minimal effect|)^2,
    but more than there are now.

    Args:
        improvements: Paired improvements so far.
        minimal_effect: The threshold to settle on either side of.
        alpha: Two-sided level of the test, as left by Holm's correction.
        power: Chance of a clear verdict.

    Returns:
        The number; `None` if it is 10,000 or more, if the mean sits on the threshold, or if the spread
        is unknown (one seed, or a run without a score).

    Complexity:
        O(log 10,000).

    Example:
        >>> seeds_needed([0.1, -0.1, 0.3, 0.2, -0.2], 0.0, 0.05)
        96
    """
    estimate = PairedMean(improvements)
    if estimate.n == 1 or not math.isfinite(estimate.mean) or estimate.mean == minimal_effect:
        return None
    effect = abs(estimate.mean - minimal_effect)
    needed = estimate.n + 1

    def enough(n: int) -> bool:
        t = float(stdtrit(n - 1, 1 - alpha / 2) + stdtrit(n - 1, power))
        return n * effect**2 >= (t * estimate.std) ** 2

    low, high = needed, MOST_SEEDS
    if not enough(high - 1) or low >= high:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
