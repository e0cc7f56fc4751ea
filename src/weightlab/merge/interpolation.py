"""The straight line between two networks, and the hill on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.merge.permutation import call_with, evaluating
from weightlab.merge.weight_descent import check_same_tensors


def interpolate(a: Mapping[str, Tensor], b: Mapping[str, Tensor], lam: float) -> dict[str, Tensor]:
    """The network (1 − lam)·a + lam·b.

    Args:
        a: Tensors by name, such as a state dict.
        b: The same names and shapes.
        lam: Where on the line: 0 is `a` and 1 is `b`, exactly; other numbers go beyond.

    Returns:
        A new dict with the names, dtypes and devices of `a`. Integers, such as counts of batches, are those of `a`.

    Raises:
        ValueError: If names or shapes differ, or `lam` is not finite.

    Example:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)
        {'w': tensor([0.2500, 0.2500])}
    """
    if not math.isfinite(lam):
        raise ValueError(f"lam must be finite, got {lam}")
    check_same_tensors(a, b)
    return {
        name: torch.lerp(x, b[name].to(x), lam) if x.is_floating_point() else x.clone()
        for name, x in a.items()
    }


@dataclass(frozen=True)
class LossBarrier:
    """Losses on the line between two networks.

    Attributes:
        barrier: Largest excess of the loss over the straight line between the losses of the ends; at least 0.
        at: Where on the line it is.
        lambdas: Points of the line, ascending from 0 to 1.
        losses: Mean losses there.
    """

    barrier: float
    at: float
    lambdas: tuple[float, ...]
    losses: tuple[float, ...]


@torch.no_grad()
def loss_barrier(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    lambdas: int | Sequence[float] = 25,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> LossBarrier:
    """Losses between two networks, and how far they rise above the straight line between the ends' losses.

    The networks are *linearly connected* if the barrier is about 0. Batch norm's running statistics are interpolated
    like all else, which is wrong for an averaged network and shows as a barrier.

    Args:
        model: A model whose tensors these are; run in evaluation mode and left as it was.
        a: One network, such as a state dict.
        b: The other, permuted to match: the same names and shapes.
        loader: Batches ``(inputs, targets)``, gone through once, so that all points see the same.
        lambdas: Points: how many, evenly spaced, or which, in [0, 1]; the ends are added. Default 25, as Git Re-Basin.
        loss: ``loss(outputs, targets)``, the mean over a batch. Default cross-entropy.

    Raises:
        ValueError: If names or shapes differ, points are fewer than 2 or outside [0, 1], or there is no batch.

    Complexity:
        For each batch and point, one interpolation and one forward pass.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> state = model.state_dict()
        >>> hill = loss_barrier(model, state, state, [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))])
        >>> hill.barrier < 1e-6, len(hill.losses)
        (True, 25)
    """
    points = points_between(lambdas)
    totals, count = [0.0] * len(points), 0
    with evaluating(model):
        for inputs, targets in loader:
            count += len(targets)
            for i, point in enumerate(points):
                outputs = call_with(model, interpolate(a, b, point), (inputs,))
                totals[i] += float(loss(outputs, targets)) * len(targets)
    if not count:
        raise ValueError("loader has no batches (a generator that was used before is empty)")
    return hill(points, [total / count for total in totals])


def points_between(lambdas: int | Sequence[float]) -> list[float]:
    """Points of a line: so many, evenly spaced, or these and the ends.

    Raises:
        ValueError: If they are fewer than 2 or outside [0, 1].

    Example:
        >>> points_between(3), points_between([0.3])
        ([0.0, 0.5, 1.0], [0.0, 0.3, 1.0])
    """
    if isinstance(lambdas, int):
        if lambdas < 2:
            raise ValueError(f"lambdas must be at least 2 points, got {lambdas}")
        return [i / (lambdas - 1) for i in range(lambdas)]
    points = sorted({0.0, 1.0, *map(float, lambdas)})
    if not all(0 <= point <= 1 for point in points):
        raise ValueError(f"lambdas must lie in [0, 1], got {list(lambdas)}")
    return points


def hill(points: Sequence[float], losses: Sequence[float]) -> LossBarrier:
    """How far losses rise above the straight line between the first and the last.

    Args:
        points: Ascending from 0 to 1.
        losses: Losses there.

    Example:
        >>> hill([0, 0.5, 1], [1.0, 4.0, 2.0])
        LossBarrier(barrier=2.5, at=0.5, lambdas=(0, 0.5, 1), losses=(1.0, 4.0, 2.0))
    """
    # The ends lie on the line by definition, whatever rounding makes of it.
    excess = [
        0.0 if point in (0, 1) else height - (losses[0] + point * (losses[-1] - losses[0]))
        for point, height in zip(points, losses, strict=True)
    ]
    # NaN anywhere must show: it is no comparison's largest.
    top = next(
        (i for i, x in enumerate(excess) if math.isnan(x)), max(range(len(excess)), key=excess.__getitem__)
    )
    return LossBarrier(excess[top], points[top], tuple(points), tuple(losses))
