"""Clipping of outlying entries at a quantile of their absolute values."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]

# On a CPU, matrices from this size on are searched in a bracket that a sample gives, in pieces that stay in
# the cache: a quantile by full selection costs ten times as much.
_LARGE = 2**13
_PIECE = 2**15


def clip_outliers(
    X: Tensor,
    q: float = 0.9,
    *,
    eps: float = 0.0,
    sample: int | None = None,
) -> Tensor:
    r"""Clip the entries of each matrix to ±ε, with ε the q-quantile of its absolute values.

    Equal to :math:`X - O` for the part :math:`O = \operatorname{sign}(X) \max(|X| - \epsilon, 0)` that
    soft-thresholding finds. Below q = 1 it always clips: a share 1 − q of the entries, outliers or not.
    Gaussian entries keep 83 % of their energy at q = 0.9.

    Args:
        X: Shape `(..., m, n)`, floating point; the leading dimensions are a batch. A vector is one batch.
        q: Quantile in (0, 1], with linear interpolation between order statistics. 1 clips nothing.
            Default 0.9, as in the official code.
        eps: Added to ε. Default 0; the official code adds 1e-9.
        sample: Estimate ε from so many entries of each matrix, spread evenly over it and the same at
            each call. For independent entries the share that lies below ε then deviates from q by
            √(q(1 − q)/sample): 0.1 % for q = 0.9 and 65,536. Default None: all entries.

    Returns:
        A new tensor of the shape, dtype and device of `X`. A matrix that holds NaN becomes NaN; an
        infinite entry is an outlier and is clipped. Gradients flow through what is not clipped; ε is a
        constant to them.

    Raises:
        TypeError: If `X` is not a real floating-point tensor.
        ValueError: If `q` or `sample` is out of range, or `X` is 0-dimensional.

    Complexity:
        Linear in the number of entries. On a CPU some 2 ns an entry, on one core whatever the number of
        threads; `sample` caps it. Elsewhere one selection of the largest, without waiting for the device.

    References:
        ROOT: Robust Orthogonalized Optimizer for Neural Network Training, arXiv 2511.20626.

    Example:
        >>> clip_outliers(torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 600.0]]), q=0.8)
        tensor([[ 1., -2.,  3.],
                [-4.,  5.,  5.]])
    """
    if not X.is_floating_point():
        raise TypeError(f"clip_outliers needs a real floating-point tensor, got {X.dtype}")
    if X.ndim == 0:
        raise ValueError("clip_outliers needs at least one dimension, got a 0-dimensional tensor")
    check_quantile(q)
    if sample is not None and sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    if q == 1 or X.numel() == 0:
        return X.clone()
    kept = X.ndim - min(X.ndim, 2)
    bound = _quantile(X.detach().flatten(kept), q, sample) + eps
    bound = bound.to(X.dtype).reshape(*X.shape[:kept], *(1,) * (X.ndim - kept))
    return X.clamp(-bound, bound)


def check_quantile(q: float, name: str = "q") -> None:
    """Raise ValueError unless `q` is in (0, 1]."""
    if not 0 < q <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {q}; 1 clips nothing")


def _quantile(values: Tensor, q: float, sample: int | None) -> Tensor:
    """q-quantile of absolute values along the last dimension, at least float32; NaN where there is NaN."""
    broken = values.amax(-1).isnan()
    if sample is not None and sample < values.size(-1):
        values = _spread(values, sample)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    position = q * (values.size(-1) - 1)
    rank = math.floor(position)
    on_host = values.device.type == "cpu" and type(values) in (Tensor, nn.Parameter)
    if on_host and not torch.compiler.is_compiling():
        rows = values.reshape(-1, values.size(-1)).numpy()
        pairs = torch.from_numpy(_neighbours_on_host(rows, rank, q)).view(*values.shape[:-1], 2)
    else:
        pairs = _neighbours(values.abs(), rank)
    low, high = pairs.unbind(-1)
    return torch.where(broken, math.nan, torch.lerp(low, high, position - rank))


def _spread(values: Tensor, count: int) -> Tensor:
    """Some entries of the last dimension, at `_places`."""
    size = values.size(-1)
    return values.index_select(-1, _places(torch.arange(count, device=values.device), size, count))


def _places(index: Any, size: int, count: int) -> Any:
    """A place in each of `count` equal stretches of `range(size)`, where in a stretch by golden section."""
    within = index * 40503 % 2**16  # 40503 / 2¹⁶ is the golden section
    return (index * size + within * size // 2**16) // count


@functools.lru_cache(maxsize=64)
def _places_on_host(size: int, count: int) -> Array:
    return _places(np.arange(count, dtype=np.int64), size, count)


def _neighbours(values: Tensor, rank: int) -> Tensor:
    """Order statistics `rank` and the next along the last dimension, shape (..., 2)."""
    size = values.size(-1)
    if rank + 1 >= size:
        return values.amax(-1, keepdim=True).expand(*values.shape[:-1], 2)
    largest = values.topk(size - rank, dim=-1, sorted=False).values
    return largest.topk(2, dim=-1, largest=False).values


def _neighbours_on_host(rows: Array, rank: int, q: float) -> Array:
    """`_neighbours` of the absolute values of each row."""
    if rows.shape[1] >= _LARGE:
        return np.stack([_neighbours_in_bracket(row, rank, q) for row in rows])
    return _select(np.abs(rows), rank)


def _select(values: Array, rank: int) -> Array:
    ranks = [rank, min(rank + 1, values.shape[-1] - 1)]
    return np.partition(values, ranks, axis=-1)[..., ranks]


def _neighbours_in_bracket(row: Array, rank: int, q: float) -> Array:
    """`_neighbours` of one row's absolute values: search only what lies between two quantiles of a sample.

    Four standard deviations to either side; should the ranks lie outside all the same, search everything.
    """
    count = min(4096, len(row) // 32)
    sample = np.sort(np.abs(row[_places_on_host(len(row), count)]))
    margin = 4 * math.sqrt(q * (1 - q) * count) + 2
    low = sample[max(0, math.floor(q * count - margin))]
    high = sample[min(count - 1, math.ceil(q * count + margin))]
    above = 0
    pieces = []
    for start in range(0, len(row), _PIECE):
        piece = np.abs(row[start : start + _PIECE])
        chosen = piece >= low
        above += int(np.count_nonzero(chosen))
        chosen &= piece <= high
        pieces.append(piece[chosen])
    inside = np.concatenate(pieces)
    below = len(row) - above
    if rank >= below and rank + 1 - below < len(inside):
        return _select(inside, rank - below)
    return _select(np.abs(row), rank)
