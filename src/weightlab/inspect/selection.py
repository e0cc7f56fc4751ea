"""Which examples to keep, by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

Strategy = Literal["hard", "easy", "random", "offset"]


def select(
    scores: Tensor,
    keep: float | int = 0.5,
    strategy: Strategy = "hard",
    *,
    offset: float | int = 0.0,
    per_class: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a subset of the examples.

    Of equal scores, the one with the larger index counts as the harder, as in the official code; so `"hard"` and
    `"easy"` part the examples without overlap.

    Args:
        scores: One an example, `(N,)`; the larger, the harder. Infinity is a score, NaN is not.
        keep: How many: a share in (0, 1], rounded to the nearest number, or a number in [1, N].
        strategy: `"hard"` keeps the largest scores, `"easy"` the smallest; `"random"` does not look at them;
            `"offset"` leaves out the hardest, which may be wrong labels, and keeps the largest scores of the rest.
        offset: How many to leave out with `"offset"`, as a share or a number. (In the official code it counts from the
            easy end: that is N − keep − ours.)
        per_class: Classes, integers `(N,)`: keep and leave out the same share of each, as nearly as whole numbers
            allow (largest remainders first). Default: one ranking for all.
        generator: Source of `"random"`.

    Returns:
        Indices of the chosen, ascending, int64 `(keep,)`.

    Raises:
        TypeError: If `keep` or `offset` is a bool.
        ValueError: If there are no scores or NaN among them, `keep` or `offset` is out of range, or the strategy is
            unknown.

    Complexity:
        O(N log N).

    References:
        Deep Learning on a Data Diet: Finding Important Examples Early in Training, arXiv 2107.07075.

    Example:
        >>> scores = torch.tensor([0.3, 0.9, 0.1, 0.9])
        >>> select(scores, keep=2), select(scores, keep=2, strategy="offset", offset=1)
        (tensor([1, 3]), tensor([0, 1]))
    """
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (N,) with N at least 1, got {tuple(scores.shape)}")
    nan = torch.isnan(scores)
    if bool(nan.any()):
        raise ValueError(f"scores must not be NaN; the one at {int(nan.nonzero()[0, 0])} is")
    if strategy not in get_args(Strategy):
        raise ValueError(f"strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}")
    n = len(scores)
    kept, left_out = _number("keep", keep, n), _number("offset", offset, n)
    if kept < 1:
        raise ValueError(f"keep must be a share in (0, 1] or a number in [1, {n}], got {keep!r}")
    if strategy != "offset" and left_out:
        raise ValueError(f'offset goes with strategy "offset", not {strategy!r}')
    if kept + left_out > n:
        raise ValueError(f"keep and offset ask for {kept} + {left_out} of {n} examples")
    if strategy == "random":
        order = torch.randperm(n, generator=generator).to(scores.device)
    else:
        order = scores.argsort(stable=True)
    if strategy == "easy":
        order = order.flip(0)
    if per_class is None:
        return order[n - left_out - kept : n - left_out].sort().values
    if per_class.shape != scores.shape:
        raise ValueError(f"per_class must have shape {tuple(scores.shape)}, got {tuple(per_class.shape)}")
    _, place, sizes = per_class.to(order.device)[order].unique(return_inverse=True, return_counts=True)
    ends = [size - out for size, out in zip(sizes.tolist(), _parts(sizes.tolist(), left_out), strict=True)]
    quotas = _parts(sizes.tolist(), kept, ends)
    chosen = [
        order[place == index][end - quota : end]
        for index, (quota, end) in enumerate(zip(quotas, ends, strict=True))
    ]
    return torch.cat(chosen).sort().values


def _number(name: str, value: float | int, n: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a share or a number, got {value!r}")
    if isinstance(value, Integral):
        if not 0 <= value <= n:
            raise ValueError(
                f"{name} must be at most the {n} examples there are and not negative, got {value}"
            )
        return int(value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share in [0, 1] or a whole number, got {value!r}")
    return max(round(value * n), int(value > 0))


def _parts(sizes: Sequence[int], total: int, limits: Sequence[int] | None = None) -> list[int]:
    """Part `total` in proportion to the sizes by largest remainders, none beyond its limit."""
    n, limits = sum(sizes), limits or sizes
    parts = [size * total // n for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(sizes[index] * total % n))
    while sum(parts) < total:
        for index in by_remainder:
            if parts[index] < limits[index] and sum(parts) < total:
                parts[index] += 1
    return parts
