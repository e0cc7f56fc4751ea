import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightlab.inspect import AreaUnderMargin, ForgettingTracker


def logits_for(right: list[int]) -> Tensor:
    """Two classes; label 0 is predicted where 1 is given."""
    return torch.tensor([[1.0, 0.0] if bit else [0.0, 1.0] for bit in right])


def tracked(history: list[list[int]]) -> Tensor:
    tracker = ForgettingTracker(len(history[0]))
    for right in history:
        tracker.update(
            torch.arange(len(right)), logits_for(right), torch.zeros(len(right), dtype=torch.int64)
        )
    return tracker.scores()


class TestForgetting:
    @pytest.mark.parametrize(
        ("sequence", "score"),
        [([0, 1, 0, 1, 0], 2), ([1, 1, 1], 0), ([0, 0, 0], float("inf")), ([0, 0, 1], 0), ([1, 0, 0], 1)],
    )
    def test_sequences(self, sequence: list[int], score: float):
        assert tracked([[bit] for bit in sequence]).tolist() == [score]

    @given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=12))
    def test_counts_falls_from_right_to_wrong(self, history: list[list[int]]):
        for example, score in enumerate(tracked(history).tolist()):
            bits = [row[example] for row in history]
            falls = sum(a == 1 and b == 0 for a, b in itertools.pairwise(bits))
            assert score == (falls if any(bits) else float("inf"))

    def test_only_those_of_the_batch_change(self):
        tracker = ForgettingTracker(4).update(torch.tensor([3, 1]), logits_for([1, 1]), torch.tensor([0, 0]))
        tracker.update(torch.tensor([1]), logits_for([0]), torch.tensor([0]))
        assert tracker.scores().tolist() == [float("inf"), 1, float("inf"), 0]

    def test_twice_in_a_batch_is_right_if_right_each_time(self):
        tracker = ForgettingTracker(1)
        for bits in ([1, 1], [0, 1], [1, 0], [1, 1]):
            tracker.update(torch.tensor([0, 0]), logits_for(bits), torch.tensor([0, 0]))
        assert tracker.scores().tolist() == [1]

    def test_half_precision_and_int32(self):
        targets = torch.tensor([0, 0], dtype=torch.int32)
        tracker = ForgettingTracker(2)
        tracker.update(torch.tensor([0, 1], dtype=torch.int32), logits_for([1, 0]).bfloat16(), targets)
        assert tracker.scores().tolist() == [0, float("inf")]


class TestAreaUnderMargin:
    def test_is_the_mean_of_what_was_seen(self):
        generator = torch.Generator().manual_seed(0)
        tracker = AreaUnderMargin(5)
        seen: dict[int, list[float]] = {index: [] for index in range(5)}
        for _ in range(20):
            indices = torch.randint(4, (3,), generator=generator)
            logits = torch.randn(3, 4, generator=generator)
            targets = torch.randint(4, (3,), generator=generator)
            tracker.update(indices, logits, targets)
            for index, row, target in zip(indices.tolist(), logits.tolist(), targets.tolist(), strict=True):
                seen[index].append(row.pop(target) - max(row))
        scores = tracker.scores()
        for index in range(4):
            assert scores[index].item() == pytest.approx(sum(seen[index]) / len(seen[index]), abs=1e-6)
        assert scores[4].isnan()


@pytest.mark.parametrize("kind", [ForgettingTracker, AreaUnderMargin])
class TestTrackers:
    def test_saved_and_resumed(self, kind, tmp_path):
        generator = torch.Generator().manual_seed(0)
        whole, first, second = kind(6), kind(6), kind(6)
        for step in range(10):
            batch = (
                torch.randperm(6, generator=generator)[:4],
                torch.randn(4, 3, generator=generator),
                torch.randint(3, (4,), generator=generator),
            )
            whole.update(*batch)
            (first if step < 5 else second).update(*batch)
            if step == 4:
                torch.save(first.state_dict(), tmp_path / "tracker.pt")
                second.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
        assert torch.equal(whole.scores(), second.scores())

    def test_keeps_no_graph(self, kind):
        logits = torch.randn(2, 3, requires_grad=True)
        assert not kind(2).update(torch.tensor([0, 1]), logits, torch.tensor([0, 1])).scores().requires_grad

    @pytest.mark.parametrize(
        ("indices", "logits", "targets", "error", "message"),
        [
            (torch.tensor([2]), torch.zeros(1, 3), torch.tensor([0]), ValueError, r"in \[0, 2\), got 2"),
            (torch.tensor([-1]), torch.zeros(1, 3), torch.tensor([0]), ValueError, r"in \[0, 2\), got -1"),
            (torch.tensor([0]), torch.zeros(1, 3), torch.tensor([3]), ValueError, r"in \[0, 3\), got 3"),
            (
                torch.tensor([0]),
                torch.zeros(2, 3),
                torch.tensor([0, 0]),
                ValueError,
                r"got \(1,\) and \(2, 3\)",
            ),
            (
                torch.tensor([0.0]),
                torch.zeros(1, 3),
                torch.tensor([0]),
                TypeError,
                "integers, got torch.float32",
            ),
            (
                torch.tensor([True]),
                torch.zeros(1, 3),
                torch.tensor([0]),
                TypeError,
                "integers, got torch.bool",
            ),
        ],
    )
    def test_bad_batches(self, kind, indices, logits, targets, error, message):
        with pytest.raises(error, match=message):
            kind(2).update(indices, logits, targets)

    def test_bad_numbers_and_states(self, kind):
        with pytest.raises(ValueError, match="n must be at least 1, got 0"):
            kind(0)
        with pytest.raises(ValueError, match=r"state must hold .* of shape \(2,\)"):
            kind(2).load_state_dict(kind(3).state_dict())
        with pytest.raises(ValueError, match="state must hold"):
            kind(2).load_state_dict({})
