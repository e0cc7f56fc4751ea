import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightlab.adapters import allocate_ranks

RATIOS = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.integers(0, 8), min_size=1, max_size=5).map(
        lambda column: [value / 8 for value in sorted(column, reverse=True)]
    ),
    min_size=1,
    max_size=5,
)


def test_hand_case():
    ratios = {"a": (0.6, 0.3, 0.05), "b": (0.4, 0.35, 0.2)}
    assert allocate_ranks(ratios, 4) == {"a": 2, "b": 2}
    assert allocate_ranks(ratios, 0) == {"a": 0, "b": 0}
    assert allocate_ranks(ratios, 1) == {"a": 1, "b": 0}
    assert allocate_ranks(ratios, 6) == {"a": 3, "b": 3}


def test_layers_of_a_group_count_its_ratios_again():
    # Sorted over layers: query .9, key .9, value .9, out .5, then query .3.
    ratios = {"x": [0.9, 0.3], "y": [0.5, 0.2]}
    groups = {"x": ["query", "key", "value"], "y": ["out"]}
    assert allocate_ranks(ratios, 5, groups) == {"query": 2, "key": 1, "value": 1, "out": 1}
    assert allocate_ranks(ratios, 2, groups) == {"query": 1, "key": 1, "value": 0, "out": 0}


@given(ratios=RATIOS, data=st.data())
def test_spends_the_budget_on_the_largest_ratios(ratios, data):
    offers = sorted((value for column in ratios.values() for value in column), reverse=True)
    budget = data.draw(st.integers(0, len(offers)))
    ranks = allocate_ranks(ratios, budget)
    assert list(ranks) == list(ratios)
    assert sum(ranks.values()) == budget
    taken = sorted((v for name, k in ranks.items() for v in ratios[name][:k]), reverse=True)
    assert taken == offers[:budget]
    assert allocate_ranks(ratios, budget) == ranks


@given(ratios=RATIOS, data=st.data())
def test_more_budget_takes_nothing_away(ratios, data):
    most = sum(map(len, ratios.values()))
    budget = data.draw(st.integers(0, most - 1))
    less, more = allocate_ranks(ratios, budget), allocate_ranks(ratios, budget + 1)
    assert sorted(more[name] - less[name] for name in ratios) == [0] * (len(ratios) - 1) + [1]


@pytest.mark.parametrize(
    ("ratios", "budget", "groups", "message"),
    [
        ({"a": [0.5]}, 2, None, r"budget must be in \[0, 1\], the number of components, got 2"),
        ({"a": [0.5]}, -1, None, r"budget must be in \[0, 1\].*got -1"),
        ({"a": [float("nan")]}, 1, None, "ratios of 'a' must be finite and not negative"),
        ({"a": [0.5, -0.1]}, 1, None, "ratios of 'a' must be finite and not negative"),
        ({"a": [0.5, 0.6]}, 1, None, "ratios of 'a' must be in descending order"),
        ({"a": [0.5]}, 1, {"b": ["q"]}, r"groups must name the inputs in ratios, \['a'\], got \['b'\]"),
    ],
)
def test_bad_input_is_named(ratios, budget, groups, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(ratios, budget, groups)
