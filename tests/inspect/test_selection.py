import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightlab.inspect import select

SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]), min_size=1, max_size=30).map(
    torch.tensor
)


class TestStrategies:
    @given(SCORES, st.data())
    def test_hard_and_easy_part_the_examples(self, scores, data):
        n = len(scores)
        keep = data.draw(st.integers(1, n))
        hard = select(scores, keep)
        assert len(hard) == keep
        assert torch.equal(hard, hard.sort().values)
        if keep < n:
            easy = select(scores, n - keep, "easy")
            assert sorted([*hard.tolist(), *easy.tolist()]) == list(range(n))
            assert scores[hard].min() >= scores[easy].max()

    @given(SCORES, st.data())
    def test_offset_is_a_window_of_the_ascending_order(self, scores, data):
        n = len(scores)
        keep = data.draw(st.integers(1, n))
        offset = data.draw(st.integers(0, n - keep))
        ascending = np.argsort(scores.numpy(), kind="stable")
        window = ascending[n - keep - offset : n - offset]
        assert select(scores, keep, "offset", offset=offset).tolist() == sorted(window.tolist())

    def test_random_follows_its_generator_alone(self):
        scores = torch.rand(50, generator=torch.Generator().manual_seed(0))

        def drawn(scores, seed):
            return select(scores, 0.4, "random", generator=torch.Generator().manual_seed(seed))

        first = drawn(scores, 1)
        assert len(first.unique()) == 20
        assert torch.equal(first, drawn(-scores, 1))
        assert not torch.equal(first, drawn(scores, 2))

    def test_random_is_uniform(self):
        counts = torch.zeros(6)
        for seed in range(600):
            chosen = select(torch.arange(6.0), 2, "random", generator=torch.Generator().manual_seed(seed))
            counts[chosen] += 1
        # Each is chosen in a third of 600 draws, with standard deviation 11.5.
        assert (counts - 200).abs().max() < 50

    @pytest.mark.parametrize(
        ("keep", "kept"), [(0.5, 5), (1.0, 10), (1, 1), (10, 10), (0.26, 3), (0.01, 1), (np.int64(4), 4)]
    )
    def test_sizes(self, keep, kept):
        assert len(select(torch.rand(10), keep)) == kept


class TestPerClass:
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
    def test_keeps_the_ratio_and_the_size(self, labels, data):
        classes, n = torch.tensor(labels), len(labels)
        keep = data.draw(st.integers(1, n))
        offset = data.draw(st.integers(0, n - keep))
        scores = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n)))
        chosen = select(scores, keep, "offset", offset=offset, per_class=classes)
        assert len(chosen.unique()) == keep
        for label in classes.unique():
            members = int((classes == label).sum())
            kept = int((classes[chosen] == label).sum())
            assert abs(kept - keep * members / n) < 2 if offset else abs(kept - keep * members / n) < 1

    def test_takes_the_hardest_of_each(self):
        scores = torch.tensor([5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0])
        classes = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        assert select(scores, 4).tolist() == [0, 1, 2, 3]
        assert select(scores, 4, per_class=classes).tolist() == [2, 3, 6, 7]
        assert select(scores, 4, "easy", per_class=classes).tolist() == [0, 1, 4, 5]
        assert select(scores, 4, "offset", offset=2, per_class=classes).tolist() == [1, 2, 5, 6]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"keep": 0}, r"keep must be a share in \(0, 1\] or a number in \[1, 4\], got 0"),
            ({"keep": 0.0}, "keep must be"),
            ({"keep": 5}, "at most the 4 examples"),
            ({"keep": 1.5}, r"share in \[0, 1\] or a whole number, got 1.5"),
            ({"keep": float("nan")}, "keep must be a share"),
            ({"keep": -1}, "not negative"),
            ({"strategy": "hardest"}, "hard, easy, random, offset, got 'hardest'"),
            ({"offset": 1}, 'offset goes with strategy "offset"'),
            ({"keep": 3, "strategy": "offset", "offset": 2}, r"ask for 3 \+ 2 of 4"),
            ({"per_class": torch.zeros(3)}, r"per_class must have shape \(4,\), got \(3,\)"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            select(torch.rand(4), **arguments)

    def test_scores(self):
        with pytest.raises(ValueError, match="the one at 1 is"):
            select(torch.tensor([0.0, float("nan")]))
        with pytest.raises(ValueError, match=r"N at least 1, got \(0,\)"):
            select(torch.zeros(0))
        with pytest.raises(TypeError, match="keep must be a share or a number, got True"):
            select(torch.rand(4), keep=True)
