"""How often training forgets an example that it had learned."""

from __future__ import annotations

import torch
from torch import Tensor

from weightlab.inspect.example_tracker import ExampleTracker


class ForgettingTracker(ExampleTracker):
    """Counts how often each example is classified wrongly right after it was classified correctly.

    An example that was never classified correctly, so far, has the score ∞: nothing is harder. Twice in one batch, an
    example is right if it is right each time.

    Args:
        n: Number of examples.
        device: Where the numbers are kept. Default: on the CPU.

    Raises:
        ValueError: If `n` is not positive.

    Complexity:
        13 bytes an example; an update is O(B K + B log B).

    References:
        An Empirical Study of Example Forgetting during Deep Neural Network Learning, arXiv 1812.05159; the form is that
        of Deep Learning on a Data Diet, arXiv 2107.07075.

    Example:
        >>> tracker = ForgettingTracker(3)
        >>> right, wrong = torch.eye(2)[[0, 0, 1]], torch.eye(2)[[0, 1, 1]]
        >>> for logits in (right, wrong, right, wrong):
        ...     tracker = tracker.update(torch.arange(3), logits, torch.tensor([0, 0, 0]))
        >>> tracker.scores()
        tensor([0., 2., inf])
    """

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        super().__init__(n, device)
        self.count = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.correct = torch.zeros(n, dtype=torch.bool, device=self.device)
        self.ever_correct = torch.zeros(n, dtype=torch.bool, device=self.device)

    def _record(self, indices: Tensor, logits: Tensor, targets: Tensor) -> None:
        examples, place = indices.unique(return_inverse=True)
        right = (logits.argmax(-1) == targets).int()
        correct = right.new_ones(len(examples)).scatter_reduce(0, place, right, "amin").bool()
        self.count[examples] += self.correct[examples] & ~correct
        self.correct[examples] = correct
        self.ever_correct[examples] |= correct

    def scores(self) -> Tensor:
        """Return the number of times each example was forgotten, float32 `(n,)`; ∞ if it was never learned."""
        return torch.where(self.ever_correct, self.count.float(), torch.inf)
