import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.exceptions import UsageError
from weightlab.trial.profiles import performance_profile

seconds = st.one_of(st.none(), st.floats(0.01, 100))
tables = st.integers(1, 5).flatmap(
    lambda tasks: st.dictionaries(
        st.sampled_from("abcde"), st.lists(seconds, min_size=tasks, max_size=tasks), min_size=1
    )
)
quick = settings(max_examples=60, deadline=None)


def names(times):
    return [f"task{k}" for k in range(len(next(iter(times.values()))))]


@quick
@given(tables, st.floats(1.1, 8))
def test_profiles_rise_within_zero_and_one_and_their_score_is_the_area(times, max_tau):
    profile = performance_profile(times, names(times), max_tau)
    taus = profile.taus
    assert taus[0] == 1.0
    assert taus[-1] == max_tau
    assert list(taus) == sorted(set(taus))
    for arm, fractions in profile.fractions.items():
        assert all(0 <= low <= high <= 1 for low, high in pairwise(fractions))
        widths = [right - left for left, right in pairwise(taus)]
        area = sum(width * share for width, share in zip(widths, fractions, strict=False))
        assert profile.scores[arm] == pytest.approx(area / (max_tau - 1), abs=1e-9)


@quick
@given(tables)
def test_fractions_count_the_tasks_solved_within_tau_times_the_best(times):
    profile = performance_profile(times, names(times))
    for arm, own in times.items():
        for tau, fraction in zip(profile.taus, profile.fractions[arm], strict=True):
            solved = 0
            for task, time in enumerate(own):
                known = [other[task] for other in times.values() if other[task] is not None]
                solved += time is not None and time / min(known) <= tau
            assert fraction == pytest.approx(solved / len(own))


@quick
@given(tables)
def test_an_arm_that_is_best_on_every_task_scores_one(times):
    tasks = names(times)
    fastest = [
        min((arm[k] for arm in times.values() if arm[k] is not None), default=1.0) / 2
        for k in range(len(tasks))
    ]
    profile = performance_profile({**times, "best": fastest}, tasks)
    assert profile.scores["best"] == pytest.approx(1.0)
    assert set(profile.fractions["best"]) == {1.0}


@quick
@given(tables, st.integers(-6, 6), st.integers(0, 4), st.randoms(use_true_random=False))
def test_order_of_arms_and_unit_of_a_tasks_time_do_not_matter(times, exponent, task, random):
    tasks = names(times)
    plain = performance_profile(times, tasks)
    order = random.sample(sorted(times), len(times))
    rescaled = {
        arm: [t if t is None or k != task else t * 2.0**exponent for k, t in enumerate(times[arm])]
        for arm in order
    }
    other = performance_profile(rescaled, tasks)
    assert other.taus == plain.taus
    assert other.fractions == plain.fractions
    assert other.scores == plain.scores


def test_a_task_nobody_solves_counts_against_all():
    profile = performance_profile({"a": [1.0, None], "b": [9.0, None]}, ["x", "y"])
    assert profile.scores == {"a": 0.5, "b": 0.0}


def test_targets_met_before_training_tie():
    profile = performance_profile({"a": [0.0], "b": [0.0], "c": [1.0]}, ["x"])
    assert profile.scores == {"a": 1.0, "b": 1.0, "c": 0.0}


@pytest.mark.parametrize(
    ("times", "tasks", "max_tau", "message"),
    [
        ({"a": [1.0]}, ["x", "y"], 4.0, "'a' has 1 times for 2 tasks"),
        ({"a": [-1.0]}, ["x"], 4.0, "-1.0"),
        ({"a": [math.nan]}, ["x"], 4.0, "nan"),
        ({"a": []}, [], 4.0, "at least one task"),
        ({"a": [1.0]}, ["x"], 1.0, "max_tau"),
    ],
)
def test_bad_input_is_named(times, tasks, max_tau, message):
    with pytest.raises(UsageError, match=message):
        performance_profile(times, tasks, max_tau)
