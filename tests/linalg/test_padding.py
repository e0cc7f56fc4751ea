import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import common_shape, merge_shapes, newton_schulz, stack_padded, unstack_padded

SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 60)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, waste=st.sampled_from([0.0, 0.125, 0.5]))
def test_groups_partition_the_shapes_and_keep_to_the_waste(shapes, waste):
    groups = merge_shapes(shapes, waste)
    assert sorted(i for group in groups for i in group) == list(range(len(shapes)))
    for group in groups:
        assert len({min(shapes[i]) for i in group}) == 1
        sides = [max(shapes[i]) for i in group]
        assert sum(sides) >= (1 - waste) * max(sides) * len(sides) - 1e-9
    equal = {(min(shape), max(shape)) for shape in shapes}
    assert len(groups) <= len(equal)
    if waste == 0:
        assert len(groups) == len(equal)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 5000), n=st.integers(1, 5000), parts=st.sampled_from([1, 4, 8]))
def test_common_shape_covers_with_little_waste_and_is_its_own_common_shape(m, n, parts):
    short, long = common_shape((m, n), parts)
    assert short == min(m, n)
    assert max(m, n) <= long < max(m, n) * (1 + 1 / parts) + 1
    assert common_shape((long, short), parts) == (short, long)


@settings(max_examples=30, deadline=None)
@given(
    short=st.integers(1, 6),
    sides=st.lists(st.integers(6, 14), min_size=1, max_size=5),
    extra=st.integers(0, 3),
)
def test_stacking_is_undone(short, sides, extra):
    matrices = [torch.randn(short, n) if i % 2 else torch.randn(n, short) for i, n in enumerate(sides)]
    stacked = stack_padded(matrices, max(sides) + extra)
    assert stacked.shape == (len(sides), short, max(sides) + extra)
    assert stacked.square().sum() == pytest.approx(sum(float(x.square().sum()) for x in matrices), rel=1e-5)
    for x, y in zip(matrices, unstack_padded(stacked, [tuple(x.shape) for x in matrices]), strict=True):
        # A square one does not tell which of its sides was the long one.
        assert torch.equal(x, y)


@pytest.mark.parametrize("method", ["direct", "symmetric", "gram"])
def test_padding_changes_no_matrix_sign(method):
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.randn(s, dtype=torch.float64, generator=generator) for s in ((20, 31), (40, 20), (20, 20))
    ]
    signs = newton_schulz(stack_padded(matrices), method=method)
    for x, y in zip(matrices, unstack_padded(signs, [tuple(x.shape) for x in matrices]), strict=True):
        torch.testing.assert_close(y, newton_schulz(x, method="direct"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: stack_padded([]), "at least one"),
        (lambda: stack_padded([torch.ones(2, 3), torch.ones(3, 4)]), "shorter side"),
        (lambda: stack_padded([torch.ones(2, 3)], 2), "width=2"),
        (lambda: stack_padded([torch.ones(3)]), "shorter side"),
        (lambda: merge_shapes([(1, 2)], -0.1), "waste"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
