import logging
import math

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from scipy.stats import qmc

from weightlab.exceptions import UsageError
from weightlab.trial.tuning import edges, free_dimensions, sample, validate_space, widen

quick = settings(max_examples=60, deadline=None)

MIXED = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "decay": FloatDistribution(0.0, 0.3),
    "momentum": FloatDistribution(0.8, 0.95, step=0.05),
    "rank": IntDistribution(1, 64, log=True),
    "steps": IntDistribution(1, 5),
    "norm": CategoricalDistribution(["layer", "rms", "none"]),
    "nesterov": CategoricalDistribution([True]),
    "beta": FloatDistribution(0.9, 0.9),
}


def unit(space, point):
    return [
        (math.log(point[name] / d.low) / math.log(d.high / d.low))
        if d.log
        else (point[name] - d.low) / (d.high - d.low)
        for name, d in sorted(space.items())
    ]


def test_every_point_also_the_first_belongs_to_the_scrambled_sobol_sequence():
    space = {"b": FloatDistribution(1e-3, 1.0, log=True), "a": FloatDistribution(-1.0, 3.0)}
    points = np.array([unit(space, point) for point in sample(space, 16, seed=7)])
    expected = qmc.Sobol(2, scramble=True, seed=7).random(16)
    np.testing.assert_allclose(points, expected, atol=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_points_fill_the_cube_evenly(dimensions):
    space = {f"x{k}": FloatDistribution(0.0, 1.0) for k in range(dimensions)}
    points = np.array([list(point.values()) for point in sample(space, 32)])
    for column in points.T:
        assert sorted(np.floor(column * 32)) == list(range(32))


def test_arms_with_equally_many_dimensions_try_the_same_points_of_the_cube():
    first = {"lr": FloatDistribution(1e-4, 1e-1, log=True), "decay": FloatDistribution(0.0, 1.0)}
    second = {
        "zeta": FloatDistribution(10.0, 20.0),
        "alpha": FloatDistribution(1.0, 8.0, log=True),
        "fixed": IntDistribution(3, 3),
    }
    second_free = {name: second[name] for name in ("zeta", "alpha")}
    ours = [unit(first, point) for point in sample(first, 8)]
    theirs = [unit(second_free, point) for point in sample(second, 8)]
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_a_longer_sample_begins_with_the_shorter_one_and_order_of_names_is_immaterial():
    longer = sample(MIXED, 13)
    assert sample(MIXED, 5) == longer[:5]
    assert sample(dict(reversed(MIXED.items())), 13) == longer
    assert sample(MIXED, 13, seed=1) != longer


def test_values_are_plain_in_range_and_reach_every_choice():
    points = sample(MIXED, 64)
    types = {"lr": float, "decay": float, "momentum": float, "rank": int, "steps": int, "norm": str}
    for point in points:
        assert list(point) == list(MIXED)
        assert all(MIXED[name]._contains(MIXED[name].to_internal_repr(point[name])) for name in MIXED)
        assert all(type(point[name]) is kind for name, kind in types.items())
        assert (point["nesterov"], point["beta"]) == (True, 0.9)
    counts = [[point["norm"] for point in points].count(choice) for choice in MIXED["norm"].choices]
    assert sorted(counts) == [21, 21, 22]
    assert {point["steps"] for point in points} == {1, 2, 3, 4, 5}


def test_a_space_without_freedom_has_one_point():
    assert sample({}, 6) == [{}]
    assert sample({"a": IntDistribution(2, 2)}, 6) == [{"a": 2}]
    assert sample({}, 0) == sample(MIXED, 0) == []


def test_refuses_a_negative_number():
    with pytest.raises(UsageError, match="-1"):
        sample(MIXED, -1)


def test_sampling_is_silent_and_leaves_optunas_verbosity(capfd):
    optuna.logging.set_verbosity(logging.INFO)
    sample(MIXED, 3)
    assert optuna.logging.get_verbosity() == logging.INFO
    assert capfd.readouterr() == ("", "")


def test_free_dimensions_counts_what_can_vary():
    assert free_dimensions(MIXED) == 6
    assert free_dimensions({}) == 0


@pytest.mark.parametrize("wrong", [(1e-4, 1e-1), 0.1, [1, 2], "log"])
def test_validate_space_names_arm_and_hyperparameter(wrong):
    validate_space("good", MIXED)
    with pytest.raises(UsageError, match=r"arm 'mine'.*\['lr'\]"):
        validate_space("mine", {"decay": FloatDistribution(0, 1), "lr": wrong})


@pytest.mark.parametrize(
    ("distribution", "value", "flag"),
    [
        (FloatDistribution(1e-4, 1e-1, log=True), 1.9e-4, "lower"),
        (FloatDistribution(1e-4, 1e-1, log=True), 2.1e-4, None),
        (FloatDistribution(1e-4, 1e-1, log=True), 0.049, None),
        (FloatDistribution(1e-4, 1e-1, log=True), 0.051, "upper"),
        (FloatDistribution(1e-4, 1e-1), 0.051, None),
        (FloatDistribution(-1.0, 1.0), -0.81, "lower"),
        (IntDistribution(1, 4), 1, "lower"),
        (IntDistribution(1, 4), 2, None),
        (IntDistribution(1, 4), 4, "upper"),
        (IntDistribution(3, 3), 3, None),
        (CategoricalDistribution([1, 2, 3]), 3, None),
    ],
)
def test_edges_are_the_outer_tenths_in_the_ranges_own_scale(distribution, value, flag):
    found = edges({"x": distribution}, {"x": value, "other": 1})
    assert found == ([f"x at its {flag} edge"] if flag else [])
    assert bool(found) == (widen({"x": distribution}, {"x": value}) != {"x": distribution})


@pytest.mark.parametrize(
    ("distribution", "value", "low", "high"),
    [
        (FloatDistribution(1e-4, 1e-2, log=True), 1e-2, 1e-4, 1e-1),
        (FloatDistribution(1e-4, 1e-2, log=True), 1e-4, 1e-5, 1e-2),
        (FloatDistribution(-1.0, 1.0), -1.0, -2.0, 1.0),
        (FloatDistribution(2.0, 6.0), 6.0, 2.0, 8.0),
        (FloatDistribution(1.0, 5.0), 1.0, 0.0, 5.0),
        (FloatDistribution(0.8, 0.98), 0.98, 0.8, 1.0),
        (FloatDistribution(0.0, 0.3), 0.0, 0.0, 0.3),
        (FloatDistribution(0.1, 0.7, step=0.2), 0.7, 0.1, 0.9),
        (FloatDistribution(0.3, 2.3, step=0.2), 0.3, 0.1, 2.3),
        (IntDistribution(1, 4), 4, 1, 6),
        (IntDistribution(1, 4), 1, 0, 4),
        (IntDistribution(2, 10, step=4), 10, 2, 14),
        (IntDistribution(4, 64, log=True), 64, 4, 256),
        (IntDistribution(4, 64, log=True), 4, 1, 64),
        (IntDistribution(2, 512, log=True), 2, 1, 512),
    ],
)
def test_widening_moves_the_flagged_side_by_half_the_range(distribution, value, low, high):
    wider = widen({"x": distribution, "y": IntDistribution(1, 2)}, {"x": value, "y": 1})["x"]
    assert type(wider) is type(distribution)
    assert (wider.log, wider.step) == (distribution.log, distribution.step)
    assert (wider.low, wider.high) == (pytest.approx(low), pytest.approx(high))


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
    st.floats(0, 1),
)
def test_widened_spaces_contain_the_old_ones_and_can_be_sampled(low, width, step, log, integer, where):
    if integer:
        step = 1 if log else step
        space = {"x": IntDistribution(low, low + width * step, log=log, step=step)}
    else:
        space = {"x": FloatDistribution(low / 100, (low + width) / 100, log=log)}
    for _ in range(3):
        now = space["x"]
        point = {"x": now.low if where < 0.5 else now.high}
        space = widen(space, point)
        assert space["x"].low <= now.low
        assert space["x"].high >= now.high
        assert space["x"].low > 0 or not log
        assert space["x"].low >= 0
    for point in sample(space, 8):
        assert space["x"]._contains(point["x"])
