import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from weightlab.exceptions import TrialError, UsageError
from weightlab.trial.analysis import compare_arms, default_target, time_to_target, unpaired
from weightlab.trial.result import SeedRun
from weightlab.trial.spec import CurvePoint, RunResult, RunSpec
from weightlab.trial.statistics import PairedMean


def run(seed, score, status="ok", curve=()):
    points = tuple(CurvePoint(step, seconds, None, metric) for step, seconds, metric in curve)
    return SeedRun(seed, score, status, points)


def arm(scores):
    return [run(seed, score) for seed, score in enumerate(scores)]


def compare(runs, **changes):
    settings = {
        "baseline": "base",
        "mode": "min",
        "minimal_effect": 0.0,
        "step_ms": {},
        "steps": 100,
        "resamples": 499,
    }
    return compare_arms(runs, **{**settings, **changes})


BASE = [2.0, 2.3, 1.9, 2.2, 2.1]


def test_differences_are_paired_by_seed_whatever_the_order_of_runs():
    challenger = [2.1, 2.0, 1.5, 2.2, 1.9]
    shuffled = [arm(challenger)[k] for k in (3, 1, 4, 0, 2)]
    versus = compare({"base": arm(BASE), "new": shuffled})["new"]
    assert versus.differences == [ours - theirs for ours, theirs in zip(challenger, BASE, strict=True)]
    test = stats.ttest_rel(challenger, BASE)
    assert versus.difference == pytest.approx(np.mean(challenger) - np.mean(BASE))
    assert versus.p_value == pytest.approx(test.pvalue)
    assert versus.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert versus.method == "paired t"
    assert versus.win_rate == 0.7
    assert versus.adjusted_interval == versus.interval
    assert versus.adjusted_p_value == versus.p_value


def test_better_is_positive_in_effect_size_and_verdict_in_both_modes():
    lower = [score - 0.3 - 0.01 * seed for seed, score in enumerate(BASE)]
    runs = {"base": arm(BASE), "new": arm(lower)}
    minimised, maximised = compare(runs)["new"], compare(runs, mode="max")["new"]
    assert (minimised.verdict, maximised.verdict) == ("held", "not held")
    assert minimised.effect_size == pytest.approx(-maximised.effect_size)
    assert minimised.effect_size > 0
    assert (minimised.win_rate, maximised.win_rate) == (1.0, 0.0)
    assert minimised.differences == maximised.differences
    assert minimised.seeds_needed is None


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("minimal_effect", [0.0, 0.1])
def test_p_value_and_verdict_are_about_the_minimal_effect(mode, minimal_effect):
    rng = np.random.default_rng(0)
    verdicts = set()
    for shift in np.linspace(-0.5, 0.8, 14):
        improvements = rng.normal(shift, 0.15, 6)
        base = rng.normal(size=6)
        scores = base + improvements if mode == "max" else base - improvements
        runs = {"base": arm(base.tolist()), "new": arm(scores.tolist())}
        versus = compare(runs, mode=mode, minimal_effect=minimal_effect)["new"]
        differences = [ours - theirs for ours, theirs in zip(scores, base, strict=True)]
        threshold = minimal_effect if mode == "max" else -minimal_effect
        assert versus.p_value == PairedMean(differences, 499).p_value(threshold)
        assert (versus.verdict == "inconclusive") == (versus.adjusted_p_value >= 0.05)
        assert (versus.seeds_needed is not None) <= (versus.verdict == "inconclusive")
        if versus.verdict != "inconclusive":
            better = improvements.mean() > minimal_effect
            assert versus.verdict == ("held" if better else "not held")
        verdicts.add(versus.verdict)
    assert verdicts == {"held", "not held", "inconclusive"}


def test_identical_results():
    runs = {"base": arm(BASE), "new": arm(BASE)}
    without, with_effect = compare(runs)["new"], compare(runs, minimal_effect=0.01)["new"]
    assert (without.verdict, with_effect.verdict) == ("inconclusive", "not held")
    assert without.interval == (0.0, 0.0)
    assert (without.effect_size, without.win_rate, without.seeds_needed) == (None, 0.5, None)


def test_one_seed_decides_nothing():
    versus = compare({"base": arm([2.0]), "new": arm([1.0])})["new"]
    assert versus.interval == (-math.inf, math.inf)
    assert (versus.verdict, versus.p_value, versus.seeds_needed) == ("inconclusive", 1.0, None)


def test_holm_tightens_verdicts_with_the_number_of_challengers():
    better = [score - gain for score, gain in zip(BASE, [0.1, 0.5, 0.3, 0.15, 0.6], strict=True)]
    noise = np.random.default_rng(5).normal(size=(4, 5))
    crowd = {f"other{k}": arm((np.array(BASE) + noise[k]).tolist()) for k in range(4)}
    alone = compare({"base": arm(BASE), "new": arm(better)})["new"]
    among = compare({"base": arm(BASE), "new": arm(better), **crowd})["new"]
    assert (alone.verdict, among.verdict) == ("held", "inconclusive")
    assert among.adjusted_p_value == pytest.approx(5 * alone.p_value)
    assert among.adjusted_interval[0] < among.interval[0]
    assert among.interval == alone.interval
    assert among.seeds_needed > 5


def test_failed_runs_count_with_their_score_and_nothing_is_dropped():
    scores = [1.8, 2.1, 1.7, 2.0]
    runs = arm([*scores, 9.0])
    runs[4] = run(4, 9.0, "diverged", [(0, 0.0, 9.0), (50, 5.0, 1.0)])
    versus = compare({"base": arm(BASE), "new": runs}, step_ms={"base": 1.0, "new": 2.0})["new"]
    assert versus.differences[4] == pytest.approx(6.9)
    assert versus.difference > 0
    assert versus.win_rate == 0.8


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_score_that_is_not_finite_is_worst_of_all(bad, mode):
    runs = arm(BASE)
    runs[2] = run(2, bad, "error")
    versus = compare({"base": arm(BASE), "new": runs}, mode=mode, step_ms={"base": 1.0, "new": 1.0})["new"]
    assert versus.differences[2] == (math.inf if mode == "min" else -math.inf)
    assert (versus.verdict, versus.win_rate) == ("inconclusive", 0.4)
    everywhere = compare({"base": arm(BASE), "new": arm([bad] * 5)}, mode=mode)["new"]
    assert everywhere.verdict == "not held"
    both = compare({"base": runs, "new": runs}, mode=mode)["new"]
    assert both.differences == [0.0] * 5


def curve(*metrics, ms=10.0):
    """Evaluations every 50 steps from step 0."""
    return [(50 * k, 50 * k * ms / 1000, metric) for k, metric in enumerate(metrics)]


def test_the_slower_arm_is_read_off_its_curve_when_the_faster_ends():
    base = [run(k, 1.0 + k / 100, curve=curve(4.0, 2.0, 1.0 + k / 100)) for k in range(3)]
    slow = [run(k, 0.5, curve=curve(4.0, 1.5, 0.5, ms=16.0)) for k in range(3)]
    matched = compare({"base": base, "slow": slow}, step_ms={"base": 10.0, "slow": 16.0})["slow"].time_matched
    assert matched.seconds == pytest.approx(1.0)
    assert matched.steps == {"base": 100, "slow": 62}
    reading = 1.5 + (0.5 - 1.5) * 12 / 50
    assert matched.difference == pytest.approx(reading - 1.01)
    expected = PairedMean([reading - (1.0 + k / 100) for k in range(3)]).interval(0.95)
    assert matched.interval == pytest.approx(expected)
    assert matched.verdict == "not held"
    swapped = compare({"base": slow, "new": base}, step_ms={"base": 16.0, "new": 10.0})["new"].time_matched
    assert swapped.difference == pytest.approx(-matched.difference)
    assert swapped.verdict == "held"


def test_arms_equally_fast_are_matched_in_time_as_in_steps():
    runs = {"base": arm(BASE), "new": arm([score - 0.1 for score in BASE])}
    versus = compare(runs, step_ms={"base": 3.0, "new": 3.0})["new"]
    assert versus.time_matched.difference == versus.difference
    assert versus.time_matched.interval == versus.interval
    assert versus.time_matched.steps == {"base": 100, "new": 100}


def test_time_matched_is_not_corrected_for_the_number_of_arms():
    rng = np.random.default_rng(2)
    others = {f"other{k}": arm((np.array(BASE) + rng.normal(size=5)).tolist()) for k in range(4)}
    better = [score - gain for score, gain in zip(BASE, [0.1, 0.5, 0.3, 0.15, 0.6], strict=True)]
    step_ms = {"base": 3.0, "new": 3.0}
    versus = compare({"base": arm(BASE), "new": arm(better), **others}, step_ms=step_ms)["new"]
    assert (versus.verdict, versus.time_matched.verdict) == ("inconclusive", "held")


@pytest.mark.parametrize(
    "step_ms", [{}, {"base": 1.0, "new": None}, {"base": 0.0, "new": 1.0}, {"base": 1.0, "new": 2.0}]
)
def test_without_times_or_curves_there_is_no_time_matched_comparison(step_ms):
    runs = {"base": arm(BASE), "new": arm(BASE)}
    assert compare(runs, step_ms=step_ms)["new"].time_matched is None


def test_a_failed_slow_run_keeps_its_score_in_the_time_matched_comparison():
    base = [run(k, 1.0, curve=curve(4.0, 2.0, 1.0)) for k in range(2)]
    slow = [run(k, 4.0, "diverged", curve(4.0, 1.0)) for k in range(2)]
    versus = compare({"base": base, "slow": slow}, step_ms={"base": 10.0, "slow": 20.0})["slow"]
    assert versus.time_matched.difference == 3.0


def test_time_to_target_interpolates_to_the_first_crossing():
    wobbly = [run(0, 3.0, curve=curve(4.0, 2.0, 3.0))]
    assert time_to_target(wobbly, 3.0, "min") == pytest.approx(0.25)
    assert time_to_target(wobbly, 2.0, "min") == pytest.approx(0.5)
    assert time_to_target(wobbly, 4.0, "min") == 0.0
    assert time_to_target(wobbly, 1.0, "min") is None
    rising = [run(0, 0.9, curve=curve(0.1, 0.5, 0.9))]
    assert time_to_target(rising, 0.8, "max") == pytest.approx(0.875)
    assert time_to_target([run(0, 1.0, curve=curve(math.nan, 1.0))], 2.0, "min") == pytest.approx(0.5)
    assert time_to_target([], 2.0, "min") is None


def test_time_to_target_is_the_median_with_failures_taking_for_ever():
    fast, slow = curve(4.0, 0.0), curve(4.0, 4.0, 0.0)
    runs = [run(0, 0.0, curve=fast), run(1, 0.0, curve=slow), run(2, 4.0, "diverged", fast)]
    assert time_to_target(runs[:2], 2.0, "min") == pytest.approx((0.25 + 0.75) / 2)
    assert time_to_target(runs, 2.0, "min") == pytest.approx(0.75)
    assert time_to_target(runs[1:], 2.0, "min") is None
    assert time_to_target(runs, math.inf, "min") is None


def test_speedup_over_the_baseline_at_the_default_target():
    base = [run(k, 1.0 + k, curve=curve(4.0, 3.0, 1.0 + k)) for k in range(3)]
    fast = [run(k, 0.0, curve=curve(4.0, 0.0, 0.0)) for k in range(3)]
    assert default_target(base) == 2.0
    versus = compare({"base": base, "fast": fast})["fast"]
    assert versus.time_to_target["fast"] == pytest.approx(0.25)
    assert versus.time_to_target["base"] == pytest.approx(1.0)
    assert versus.speedup == pytest.approx(4.0)
    never = compare({"base": base, "fast": fast}, target=-1.0)["fast"]
    assert never.time_to_target == {"fast": None, "base": None}
    assert never.speedup is None
    trivial = compare({"base": base, "fast": fast}, target=5.0)["fast"]
    assert trivial.speedup is None


def result(seed, weights="w", data="d", status="ok"):
    spec = RunSpec("t", "", "a", "", {}, seed, "test", 10, 1, 8, 1, "cpu", {})
    return RunResult(spec, status, weights_hash=weights, data_hash=data)


def test_unpaired_names_seed_and_arms():
    paired = {name: [result(0), result(1, "w1", "d1")] for name in ("a", "b", "c")}
    assert unpaired(paired) == []
    broken = {**paired, "b": [result(0, weights="x"), result(1, "w1", "other")]}
    assert unpaired(broken) == [
        "seed 0: initial weights differ: a, c | b",
        "seed 1: training batches differ: a, c | b",
    ]


def test_runs_that_stopped_early_are_not_blamed_for_the_batches_they_never_saw():
    short = result(0, data="fewer", status="diverged")
    early = result(0, weights=None, data=None, status="error")
    assert unpaired({"a": [result(0)], "b": [short], "c": [early]}) == []
    assert unpaired({"a": [result(0)], "b": [replace(short, weights_hash="x")]}) == [
        "seed 0: initial weights differ: a | b"
    ]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"new": arm(BASE)}, "baseline 'base' has no runs"),
        ({"base": [], "new": []}, "baseline 'base' has no runs"),
        ({"base": arm(BASE), "new": arm(BASE[:4])}, r"'new' has seeds \[0, 1, 2, 3\]"),
        ({"base": arm(BASE[:1]) * 2, "new": arm(BASE[:1]) * 2}, "cannot be paired"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(runs, message):
    with pytest.raises(TrialError, match=message):
        compare(runs)


@pytest.mark.parametrize("minimal_effect", [-0.1, math.nan, math.inf])
def test_minimal_effect_must_be_a_non_negative_number(minimal_effect):
    with pytest.raises(UsageError, match="minimal_effect"):
        compare({"base": arm(BASE), "new": arm(BASE)}, minimal_effect=minimal_effect)


def test_level_must_be_a_probability():
    with pytest.raises(UsageError, match="level"):
        compare({"base": arm(BASE), "new": arm(BASE)}, level=95)


def test_baseline_alone_has_no_comparisons():
    assert compare({"base": arm(BASE)}) == {}
