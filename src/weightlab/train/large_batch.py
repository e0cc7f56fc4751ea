"""Training with a large batch as well as with a small one: learning rate, length and gradient noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Rule = Literal["sqrt", "linear"]


def scale_lr(lr: float, batch: int, ref_batch: int, rule: Rule = "sqrt") -> float:
    r"""Carry a learning rate over from one batch size to another.

    The covariance of an SGD update is about :math:`(\eta^2/B)\,\frac1N\sum_n g_n g_n^\top`; scaling with the square root of
    the batch ratio keeps it. Linear scaling keeps the mean displacement an epoch instead.

    Args:
        lr: Learning rate that suits `ref_batch`.
        batch: Batch size to be used.
        ref_batch: Batch size that `lr` was chosen for.
        rule: `"sqrt"` (default; the paper's) or `"linear"`.

    Returns:
        The learning rate for `batch`.

    Raises:
        ValueError: If an argument is not positive or the rule unknown.

    References:
        Train longer, generalize better: closing the generalization gap in large batch training of neural networks,
        arXiv 1705.08741.

    Example:
        >>> round(scale_lr(0.1, 4096, 128), 4), scale_lr(0.1, 4096, 128, "linear")
        (0.5657, 3.2)
    """
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr}")
    _check_batches(batch, ref_batch)
    if rule == "sqrt":
        return lr * math.sqrt(batch / ref_batch)
    if rule == "linear":
        return lr * (batch / ref_batch)
    raise ValueError(f'rule must be "sqrt" or "linear", got {rule!r}')


class Regime(NamedTuple):
    """When to drop the learning rate, and when to stop, in epochs."""

    milestones: tuple[int, ...]
    total: int


def adapt_regime(milestones: Sequence[int], total: int, batch: int, ref_batch: int) -> Regime:
    r"""Lengthen a schedule so that a larger batch makes as many updates as the reference batch did.

    Every epoch number is multiplied by :math:`\lceil B / B_\text{ref} \rceil`. Learning rates are not touched; those at
    later milestones scale like the first, see `scale_lr`. A smaller batch keeps the schedule.

    Args:
        milestones: Epochs at which the learning rate drops, ascending.
        total: Epochs in all.
        batch: Batch size to be used.
        ref_batch: Batch size that the schedule was made for.

    Returns:
        The new `(milestones, total)`.

    Raises:
        ValueError: If batch sizes or epochs are not positive, or milestones do not ascend or lie after the end.

    References:
        Train longer, generalize better, arXiv 1705.08741.

    Example:
        >>> adapt_regime([81, 122, 164], 200, batch=1000, ref_batch=128)
        Regime(milestones=(648, 976, 1312), total=1600)
    """
    _check_batches(batch, ref_batch)
    if total < 1:
        raise ValueError(f"total must be at least 1 epoch, got {total}")
    bounds = [0, *milestones, total]
    if sorted(bounds) != bounds:
        raise ValueError(f"milestones must ascend from 0 to total={total}, got {list(milestones)}")
    factor = -(-batch // ref_batch)
    return Regime(tuple(epoch * factor for epoch in milestones), total * factor)


class MultiplicativeGradientNoise(nn.Module):
    r"""Mean of per-example losses, each weighted by Gaussian noise: small-batch gradient noise in a large batch.

    .. math:: L = \frac1B \sum_n z_n \ell_n, \quad z_n \sim \mathcal N(1, \sigma^2), \quad \sigma^2 = B/B_\text{ref} - 1

    The gradient keeps its mean. Its covariance becomes :math:`\frac{1+\sigma^2}{B}\,\mathbb E\,g g^\top` where the mean gradient is
    small beside single ones: that of a batch of :math:`B_\text{ref}`, at an unchanged learning rate. (The paper asks for
    :math:`\sigma^2 \propto B`; this factor is the one that makes the two equal.) In evaluation it is the plain mean.

    Args:
        batch: Batch size B in use.
        ref_batch: Batch size whose noise is wanted, at most `batch`.
        generator: Source of the noise, on the losses' device; by default PyTorch's global one.

    Raises:
        ValueError: If batch sizes are not positive, or `ref_batch` is above `batch`; when called, for losses
            that are not a vector.

    References:
        Train longer, generalize better, arXiv 1705.08741.

    Example:
        >>> criterion = MultiplicativeGradientNoise(batch=4, ref_batch=1)
        >>> criterion.std
        1.7320508075688772
        >>> logits, labels = torch.zeros(4, 10), torch.tensor([1, 2, 3, 4])
        >>> criterion(nn.functional.cross_entropy(logits, labels, reduction="none")).shape
        torch.Size([])
    """

    def __init__(self, batch: int, ref_batch: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check_batches(batch, ref_batch)
        if ref_batch > batch:
            raise ValueError(f"ref_batch={ref_batch} is above batch={batch}: noise can only be added")
        self.std = math.sqrt(batch / ref_batch - 1)
        self.generator = generator

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted mean of losses `(B,)`, a scalar."""
        if losses.ndim != 1:
            raise ValueError(
                f'losses must be one number an example, shape (B,), got {tuple(losses.shape)}; use reduction="none"'
            )
        if not self.training or self.std == 0:
            return losses.mean()
        noise = torch.randn(losses.shape, generator=self.generator, device=losses.device, dtype=losses.dtype)
        return (losses * noise.mul_(self.std).add_(1)).mean()

    def extra_repr(self) -> str:
        """Return the noise's standard deviation."""
        return f"std={self.std:g}"


def _check_batches(batch: int, ref_batch: int) -> None:
    for name, value in (("batch", batch), ("ref_batch", ref_batch)):
        if not value >= 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
