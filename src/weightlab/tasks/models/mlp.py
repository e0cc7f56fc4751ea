"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear layers with ReLU between, `[batch, ...] -> [batch, sizes[-1]]` logits.

    Weights start as `nn.Linear` leaves them.

    Args:
        sizes: Features of the flattened input, of each hidden layer, and of the output.

    Raises:
        ValueError: When there are fewer than two sizes.

    Example:
        >>> import torch
        >>> MLP([64, 32, 10])(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least input and output, not {list(sizes)}")
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes[:-1]))
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)
