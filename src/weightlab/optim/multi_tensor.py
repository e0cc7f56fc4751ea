"""Typed names for torch's multi-tensor operations: one launch for many tensors on an accelerator.

On a CPU, and where shapes or devices are mixed, each falls back to one operation a tensor. Names,
meanings and the trailing underscore for in-place forms are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
_torch: Any = torch


def neg(tensors: Tensors) -> list[Tensor]:
    """Return `−t`."""
    return list(_torch._foreach_neg(tensors))


def mul(tensors: Tensors, others: Tensors | Sequence[float] | Tensor | float) -> list[Tensor]:
    """Return `t · other`."""
    return list(_torch._foreach_mul(tensors, others))


def mul_(tensors: Tensors, others: Tensors | Tensor | float) -> None:
    """Multiply in place."""
    _torch._foreach_mul_(tensors, others)


def add(tensors: Tensors, others: Tensors, *, alpha: float = 1.0) -> list[Tensor]:
    """Return `t + alpha · other`."""
    return list(_torch._foreach_add(tensors, others, alpha=alpha))


def add_(tensors: Tensors, others: Tensors, *, alpha: float = 1.0) -> None:
    """Add `alpha · other` in place."""
    _torch._foreach_add_(tensors, others, alpha=alpha)


def addcmul_(tensors: Tensors, first: Tensors, second: Tensors, values: Sequence[float]) -> None:
    """Add `value · first · second` in place; `second` may hold 0-dim tensors."""
    _torch._foreach_addcmul_(tensors, first, second, values)


def lerp(tensors: Tensors, ends: Tensors, weight: float) -> list[Tensor]:
    """Return `t + weight · (end − t)`."""
    return list(_torch._foreach_lerp(tensors, ends, weight))


def lerp_(tensors: Tensors, ends: Tensors, weight: float) -> None:
    """Interpolate in place."""
    _torch._foreach_lerp_(tensors, ends, weight)


def norm(tensors: Tensors) -> list[Tensor]:
    """Return the Euclidean norm of each tensor, 0-dim."""
    return list(_torch._foreach_norm(tensors))


def sinh_(tensors: Tensors) -> None:
    """Take the hyperbolic sine in place."""
    _torch._foreach_sinh_(tensors)


def clamp_(tensors: Tensors, low: float, high: float) -> None:
    """Clamp in place; NaN stays NaN."""
    _torch._foreach_clamp_min_(tensors, low)
    _torch._foreach_clamp_max_(tensors, high)


def copy_(tensors: Tensors, sources: Tensors) -> None:
    """Copy in place, across dtypes."""
    _torch._foreach_copy_(tensors, sources)
