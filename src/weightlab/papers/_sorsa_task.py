"""The shifted digits, with the state of SORSA's factors among the metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightlab.tasks.adapt_digits import AdaptDigits
from weightlab.tasks.base import Split


class DigitsAndFactors(AdaptDigits):
    """`adapt-digits` whose `evaluate` also tells how well conditioned and how orthonormal SORSA's factors are.

    With SORSA adapters in the model there are two more metrics, means over the adapted layers: `condition`, the decimal
    logarithm of the condition number of the trained part B diag(S) A, and `deviation`, the mean of ‖BᵀB − I‖_F and
    ‖AAᵀ − I‖_F.
    """

    name = "adapt-digits, factors measured"

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return the task's metrics and those of the factors."""
        return {**super().evaluate(model, split), **factor_metrics(model)}


@torch.no_grad()
def factor_metrics(model: nn.Module) -> dict[str, float]:
    """Measure the SORSA factors of a model; nothing if there are none."""
    from weightlab.adapters.sorsa import SorsaLayer, orthonormality

    factors = [
        layer.factors(name)
        for layer in model.modules()
        if isinstance(layer, SorsaLayer)
        for name in layer.active_adapters
    ]
    if not factors:
        return {}
    deviations = [(orthonormality(f.left.mT) + orthonormality(f.right)) / 2 for f in factors]
    return {
        "condition": _mean([log_condition(f.scaled_left, f.right) for f in factors]),
        "deviation": _mean(deviations),
    }


def log_condition(left: Tensor, right: Tensor) -> Tensor:
    """Decimal logarithm of the largest over the smallest of the r singular values of P A.

    Args:
        left: P, (out, r).
        right: A, (r, in).

    Returns:
        A scalar; 12 where the product has a rank below r.

    Example:
        >>> log_condition(torch.eye(5, 2) * torch.tensor([100.0, 1.0]), torch.eye(2, 4))
        tensor(2.)
    """
    values = torch.linalg.svdvals(torch.linalg.qr(left.double()).R @ torch.linalg.qr(right.double().mT).R.mT)
    return (values[0] / values[-1].clamp_min(1e-12 * values[0])).log10().float()


def _mean(values: Sequence[Tensor]) -> float:
    return statistics.fmean(map(float, values))
