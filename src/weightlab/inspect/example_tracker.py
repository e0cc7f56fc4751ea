"""What trackers of single examples share: numbers by index, checked, saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from weightlab.inspect.example_scores import check_targets


class ExampleTracker(ABC):
    """Keeps numbers of each of `n` examples while a model trains. Subclasses say which.

    Args:
        n: Number of examples.
        device: Where the numbers are kept.

    Raises:
        ValueError: If `n` is not positive.
    """

    def __init__(self, n: int, device: torch.device | str | None = None) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self.n = n
        self.device = torch.device(device or "cpu")

    @abstractmethod
    def scores(self) -> Tensor:
        """Return the score of each example, `(n,)`."""

    @abstractmethod
    def _record(self, indices: Tensor, logits: Tensor, targets: Tensor) -> None: ...

    def update(self, indices: Tensor, logits: Tensor, targets: Tensor) -> Self:
        """Take in a batch: what the model said in the training's forward pass, before the step.

        Args:
            indices: Which examples, integers `(B,)` in `[0, n)`.
            logits: `(B, K)`, floating.
            targets: Their classes, integers `(B,)`.

        Returns:
            The tracker itself.

        Raises:
            TypeError: If the dtypes are others.
            ValueError: If the shapes are others, or an index or a target is out of range.
        """
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise TypeError(f"indices must be integers, got {indices.dtype}")
        if logits.ndim != 2 or indices.shape != logits.shape[:1]:
            raise ValueError(
                f"indices must be (B,) and logits (B, K), got {tuple(indices.shape)} and {tuple(logits.shape)}"
            )
        logits = logits.detach().to(self.device)
        indices = indices.to(self.device, torch.int64)
        targets = check_targets(logits, targets.to(self.device))
        wrong = (indices < 0) | (indices >= self.n)
        if bool(wrong.any()):
            raise ValueError(f"indices must be in [0, {self.n}), got {int(indices[wrong][0])}")
        self._record(indices, logits, targets)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the numbers, not copied."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over numbers that `state_dict` gave.

        Raises:
            ValueError: If they are of another kind of tracker, or of another number of examples.
        """
        own = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != dict.fromkeys(own, (self.n,)):
            raise ValueError(f"state must hold {', '.join(own)} of shape ({self.n},), got {shapes}")
        for name, value in own.items():
            value.copy_(state[name])
