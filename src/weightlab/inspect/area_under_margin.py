"""How far, over the whole of training, an example's label stays ahead of the other classes."""

from __future__ import annotations

import torch
from torch import Tensor

from weightlab.inspect.example_scores import logit_margin
from weightlab.inspect.example_tracker import ExampleTracker


class AreaUnderMargin(ExampleTracker):
    """Averages the margin z_y − max_{k≠y} z_k of each example over training.

    Small where what is learned from other examples speaks against the label: of wrong labels, and of hard examples.

    Args:
        n: Number of examples.
        device: Where the numbers are kept. Default: on the CPU.

    Raises:
        ValueError: If `n` is not positive.

    Complexity:
        16 bytes an example; an update is O(B K).

    References:
        Identifying Mislabeled Data using the Area Under the Margin Ranking, arXiv 2001.10528.

    Example:
        >>> tracker = AreaUnderMargin(2)
        >>> for logits in ([[3.0, 1.0]], [[1.0, 2.0]]):
        ...     tracker = tracker.update(torch.tensor([0]), torch.tensor(logits), torch.tensor([0]))
        >>> tracker.scores()
        tensor([0.5000,    nan], dtype=torch.float64)
    """

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        super().__init__(n, device)
        self.total = torch.zeros(n, dtype=torch.float64, device=self.device)
        self.count = torch.zeros(n, dtype=torch.int64, device=self.device)

    def _record(self, indices: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.total.index_add_(0, indices, logit_margin(logits, targets).double())
        self.count.index_add_(0, indices, torch.ones_like(indices))

    def scores(self) -> Tensor:
        """Return the mean margin of each example, float64 `(n,)`; NaN if it was never seen. The smaller, the harder."""
        return self.total / self.count
