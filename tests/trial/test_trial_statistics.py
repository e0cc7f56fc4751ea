import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from weightlab.exceptions import TrialError, UsageError
from weightlab.trial.statistics import (
    PairedMean,
    decide,
    effect_size,
    holm,
    paired_interval,
    paired_p_value,
    seeds_needed,
    win_rate,
)

# Few resamples: what is tested here holds for any number of them.
FEW = 499
quick = settings(max_examples=40, deadline=None)
values = st.floats(-1e3, 1e3, allow_subnormal=False)
# Coarse values tie often, fine ones hardly ever: both kinds of metric occur.
samples = st.one_of(
    st.lists(values, min_size=2, max_size=14),
    st.lists(st.integers(-4, 4).map(lambda k: k / 100), min_size=2, max_size=14),
)


def bca_by_scipy(data, one_sided_alpha, resamples, seed=0):
    result = stats.bootstrap(
        (np.sort(data),),
        # A resample that draws every value once has the mean of the data, whatever the order of adding.
        lambda sample, axis: np.round(np.mean(sample, axis=axis), 11),
        confidence_level=1 - 2 * one_sided_alpha,
        n_resamples=resamples,
        method="BCa",
        random_state=np.random.default_rng(seed),
    )
    return tuple(result.confidence_interval)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_values_give_the_paired_t_interval(n):
    data = np.random.default_rng(n).normal(0.3, 1.0, n)
    low, high, method = paired_interval(data.tolist(), 0.9)
    expected = stats.ttest_1samp(data, 0.0).confidence_interval(0.9)
    assert method == "paired t"
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    p = paired_p_value(data.tolist(), 0.2)
    assert p == pytest.approx(stats.ttest_1samp(data, 0.2).pvalue, rel=1e-12)


@pytest.mark.parametrize("n", [6, 9, 25])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_from_six_values_each_end_is_the_farther_of_t_and_the_widened_bca(n, level):
    rng = np.random.default_rng(n)
    beyond_t = 0
    for _ in range(10):
        # Positive, so that the arrangement that is resampled is the ascending one.
        data = rng.exponential(size=n) ** 1.5
        alpha = (1 - level) / 2
        widened = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.isf(alpha, n - 1))
        bca_low, bca_high = bca_by_scipy(data, widened, 2_000)
        t = stats.ttest_1samp(data, 0.0).confidence_interval(level)
        estimate = PairedMean(data.tolist(), 2_000)
        assert estimate.method == "BCa bootstrap"
        low, high = estimate.interval(level)
        assert low == pytest.approx(min(bca_low, t.low), rel=1e-9)
        assert high == pytest.approx(max(bca_high, t.high), rel=1e-9)
        beyond_t += high > t.high + 1e-9
    assert beyond_t >= 5


@quick
@given(samples, st.floats(0.001, 0.9), st.floats(-2, 2))
def test_p_value_is_below_alpha_exactly_when_the_interval_excludes_the_threshold(data, alpha, where):
    estimate = PairedMean(data, FEW)
    spread = max(data) - min(data)
    threshold = estimate.mean + where * spread
    p = estimate.p_value(threshold)
    assume(abs(p - alpha) > 1e-6)
    low, high = estimate.interval(1 - alpha)
    assert (p < alpha) == (threshold < low or threshold > high)


@quick
@given(samples, st.floats(0.01, 0.6))
def test_the_p_value_of_an_interval_end_is_one_minus_its_level(data, alpha):
    assume(np.std(data) > 1e-3)
    estimate = PairedMean(data, FEW)
    for outwards, end in zip((-1, 1), estimate.interval(1 - alpha), strict=True):
        step = outwards * 1e-9 * (max(data) - min(data))
        assert estimate.p_value(end + step) <= alpha + 1e-6
        assert estimate.p_value(end - step) >= alpha - 1e-6


@quick
@given(samples, st.floats(0.05, 0.9), st.floats(1.01, 1.09))
def test_intervals_are_nested_and_contain_the_mean(data, level, factor):
    estimate = PairedMean(data, FEW)
    low, high = estimate.interval(level)
    wider_low, wider_high = estimate.interval(level * factor)
    assert wider_low <= low <= estimate.mean <= high <= wider_high


@quick
@given(samples, st.randoms(use_true_random=False))
def test_order_of_seeds_does_not_matter_and_swapping_arms_mirrors_the_interval(data, random):
    # Data that are their own mirror image keep one arrangement, so only their noise is not mirrored.
    assume(sorted(data) != sorted(-value for value in data))
    low, high = PairedMean(data, FEW).interval(0.95)
    shuffled = random.sample(data, len(data))
    assert PairedMean(shuffled, FEW).interval(0.95) == pytest.approx((low, high), rel=1e-9, abs=1e-12)
    mirrored = PairedMean([-value for value in data], FEW)
    assert mirrored.interval(0.95) == (-high, -low)
    assert mirrored.p_value(-0.01) == PairedMean(data, FEW).p_value(0.01)


@quick
@given(samples, st.integers(-20, 20))
def test_interval_scales_with_the_unit_of_the_metric(data, exponent):
    factor = 2.0**exponent
    low, high = PairedMean(data, FEW).interval(0.95)
    scaled = PairedMean([factor * value for value in data], FEW).interval(0.95)
    assert scaled == pytest.approx((factor * low, factor * high), rel=1e-6, abs=1e-9 * factor)


def test_interval_is_the_same_every_time():
    data = np.random.default_rng(3).normal(size=10).tolist()
    assert paired_interval(data, 0.95) == paired_interval(data, 0.95)


def test_extreme_levels_stay_ordered_and_outside_the_data():
    data = [0.0] * 11 + [100.0]
    estimate = PairedMean(data, FEW)
    low, high = estimate.interval(1 - 1e-9)
    assert low < estimate.interval(0.99)[0] < estimate.mean < estimate.interval(0.99)[1] < high
    assert high > 100


@pytest.mark.parametrize("n", [1, 5, 8])
def test_degenerate_data(n):
    estimate = PairedMean([0.25] * n)
    if n == 1:
        assert estimate.interval(0.95) == (-math.inf, math.inf)
        assert estimate.p_value(0.0) == 1.0
    else:
        assert estimate.interval(0.95) == (0.25, 0.25)
        assert (estimate.p_value(0.0), estimate.p_value(0.25)) == (0.0, 1.0)
    assert estimate.mean == 0.25


def test_nearly_equal_values_do_not_break_the_bootstrap():
    for data in ([0.1 + k * 1e-16 for k in range(8)], [0.0] * 7 + [1e-300], [0.0] * 7 + [1e-12]):
        low, high = PairedMean(data, FEW).interval(0.95)
        assert low <= np.mean(data) <= high


def test_infinite_differences_are_never_evidence_unless_unanimous():
    for data in ([math.inf, 1.0, 2.0], [-math.inf, math.inf, 0.0], [-math.inf] + [0.0] * 9):
        assert PairedMean(data).interval(0.95) == (-math.inf, math.inf)
        assert PairedMean(data).p_value(0.0) == 1.0
    assert decide(PairedMean([-math.inf] * 3).interval(0.95), 0.1) == "not held"


@pytest.mark.parametrize("data", [[], [math.nan, 1.0], [[1.0, 2.0]]])
def test_refuses_what_is_no_list_of_numbers(data):
    with pytest.raises(TrialError, match="differences"):
        PairedMean(data)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_refuses_levels_outside_zero_to_one(level):
    with pytest.raises(UsageError, match="level"):
        paired_interval([1.0, 2.0], level)


@quick
@given(st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferronis(p_values):
    alpha = 0.05
    for name, step in holm(p_values, alpha).items():
        others = [p for other, p in p_values.items() if other != name]
        # Every intersection hypothesis that contains this one, tested by Bonferroni; the hardest to
        # reject of each size holds the largest other p-values.
        hardest = [
            min(1.0, (size + 1) * min([p_values[name], *sorted(others, reverse=True)[:size]]))
            for size in range(len(others) + 1)
        ]
        assert step.adjusted_p_value == pytest.approx(max(hardest))
        if abs(step.adjusted_p_value - alpha) > 1e-9:
            assert (step.adjusted_p_value < alpha) == (p_values[name] < step.alpha)
        assert alpha / len(p_values) <= step.alpha <= alpha


def test_holm_shares_the_stricter_level_between_equals_whatever_the_order():
    first = holm({"a": 0.02, "b": 0.02, "c": 0.5}, 0.1)
    second = holm({"c": 0.5, "b": 0.02, "a": 0.02}, 0.1)
    assert first == second
    assert first["a"] == first["b"] == (pytest.approx(0.06), pytest.approx(0.1 / 3))
    assert first["c"] == (0.5, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("interval", "minimal_effect", "verdict"),
    [
        ((0.01, 0.2), 0.0, "held"),
        ((0.01, 0.2), 0.05, "inconclusive"),
        ((0.06, 0.2), 0.05, "held"),
        ((0.05, 0.2), 0.05, "inconclusive"),
        ((-0.2, 0.04), 0.05, "not held"),
        ((0.01, 0.04), 0.05, "not held"),
        ((-0.2, -0.01), 0.0, "not held"),
        ((-0.2, 0.0), 0.0, "inconclusive"),
        ((0.0, 0.0), 0.0, "inconclusive"),
        ((0.0, 0.0), 0.01, "not held"),
        ((-math.inf, math.inf), 0.0, "inconclusive"),
    ],
)
def test_verdicts(interval, minimal_effect, verdict):
    assert decide(interval, minimal_effect) == verdict


def test_effect_size_is_unbiased_on_normal_data():
    rng = np.random.default_rng(11)
    estimates = [effect_size(row.tolist()) for row in rng.normal(0.7, 1.0, (4_000, 6))]
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(0.7, abs=4 * error)
    assert error < 0.015


def test_effect_size_needs_three_values_that_vary():
    assert effect_size([1.0, 2.0]) is None
    assert effect_size([1.0, 1.0, 1.0]) is None
    assert effect_size([math.inf, 1.0, 2.0]) is None


@quick
@given(samples)
def test_win_rates_of_the_two_arms_sum_to_one(data):
    assert win_rate(data) + win_rate([-value for value in data]) == pytest.approx(1)
    assert 0 <= win_rate(data) <= 1


@pytest.mark.parametrize(("gap", "alpha"), [(0.5, 0.05), (1.0, 0.05), (0.3, 0.05 / 3), (-0.4, 0.05)])
def test_seeds_needed_gives_the_power_it_promises(gap, alpha):
    minimal_effect = 0.2
    data = np.array([-1.0, 1.0, 0.5, -0.5])
    data = data / data.std(ddof=1) + minimal_effect + gap
    n = seeds_needed(data.tolist(), minimal_effect, alpha)
    power = [
        stats.nct.sf(stats.t.isf(alpha / 2, size - 1), size - 1, abs(gap) * math.sqrt(size))
        for size in (n - 2, n)
    ]
    assert power[0] < 0.8 <= power[1] + 0.005


def test_seeds_needed_where_no_number_helps():
    spread = [-1.0, 1.0, -1.0, 1.0]
    assert seeds_needed([value + 0.2 for value in spread], 0.2, 0.05) is None
    assert seeds_needed([value + 0.001 for value in spread], 0.0, 0.05) is None
    assert seeds_needed([0.5], 0.0, 0.05) is None
    assert seeds_needed([math.inf, 0.0], 0.0, 0.05) is None
    assert seeds_needed([0.0, 0.0], 0.0, 0.05) is None


def test_seeds_needed_is_more_than_there_are():
    assert seeds_needed([1.0, 1.1, 0.9], 0.0, 0.05) == 4
