"""Clipping of outlying entries at a quantile of their absolute values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# On a CPU, matrices from this size on are searched in a bracket that a sample gives.
_LARGE = 2**16
_SAMPLE = 2**11


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
        infinite entry is an outlier and is clipped.

    Raises:
        TypeError: If `X` is not a real floating-point tensor.
        ValueError: If `q` or `sample` is out of range, or `X` is 0-dimensional.

    Complexity:
        Linear in the number of entries: on a CPU some three passes, elsewhere one selection of the largest.

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
    bound = _quantile(X.abs().flatten(kept), q, sample) + eps
    bound = bound.to(X.dtype).reshape(*X.shape[:kept], *(1,) * (X.ndim - kept))
    return torch.maximum(torch.minimum(X, bound), -bound)


def check_quantile(q: float, name: str = "q") -> None:
    """Raise ValueError unless `q` is in (0, 1]."""
    if not 0 < q <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {q}; 1 clips nothing")


def _quantile(values: Tensor, q: float, sample: int | None) -> Tensor:
    """q-quantile along the last dimension, at least float32; NaN where there is NaN."""
    size = values.size(-1)
    broken = values.amax(-1).isnan()
    if sample is not None and sample < size:
        values = _spread(values, sample)
        size = sample
    position = q * (size - 1)
    rank = math.floor(position)
    wide = torch.promote_types(values.dtype, torch.float32)
    if values.device.type == "cpu" and size >= _LARGE and not torch.compiler.is_compiling():
        rows = values.reshape(-1, size)
        pairs = torch.stack([_neighbours_in_bracket(row, rank, q) for row in rows])
        pairs = pairs.reshape(*values.shape[:-1], 2)
    else:
        pairs = _neighbours(values, rank)
    low, high = pairs.to(wide).unbind(-1)
    return torch.where(broken, math.nan, torch.lerp(low, high, position - rank))


def _spread(values: Tensor, count: int) -> Tensor:
    """One entry out of each of `count` equal stretches of the last dimension, its place in it by golden section."""
    size = values.size(-1)
    index = torch.arange(count, device=values.device)
    within = index * 40503 % 2**16  # 40503 / 2¹⁶ is the golden section
    return values.index_select(-1, (index * size + within * size // 2**16) // count)


def _neighbours(values: Tensor, rank: int) -> Tensor:
    """Order statistics `rank` and the next along the last dimension, shape (..., 2)."""
    size = values.size(-1)
    if rank + 1 >= size:
        return values.amax(-1, keepdim=True).expand(*values.shape[:-1], 2)
    largest = values.topk(size - rank, dim=-1, sorted=False).values
    return largest.topk(2, dim=-1, largest=False).values


def _neighbours_in_bracket(values: Tensor, rank: int, q: float) -> Tensor:
    """`_neighbours` of one row: search only what lies between two quantiles of a sample.

    Four standard deviations to either side; should the ranks lie outside all the same, search everything.
    """
    sample = _spread(values, _SAMPLE).sort().values
    margin = 4 * math.sqrt(q * (1 - q) * _SAMPLE) + 2
    low = sample[max(0, math.floor(q * _SAMPLE - margin))]
    high = sample[min(_SAMPLE - 1, math.ceil(q * _SAMPLE + margin))]
    below = int((values < low).sum())
    inside = values[(values >= low) & (values <= high)]
    if rank >= below and rank + 1 - below < inside.numel():
        return _neighbours(inside, rank - below)
    return _neighbours(values, rank)
