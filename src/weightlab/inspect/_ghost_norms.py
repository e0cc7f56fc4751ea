"""Squared norms of per-example gradients, from the factors that backpropagation multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution's kernel, each entry of one dimension of space."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which squares of `dtype` are added: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_square(gradient: Tensor) -> Tensor:
    """Squared norms of a stack of gradients, `(B, ...) -> (B,)`."""
    dtype = accumulation_dtype(gradient.dtype)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=dtype).square()


def outer_square(left: Tensor, right: Tensor, buffer: int) -> Tensor:
    """Squared norms of `Σ_t left_t right_tᵀ`.

    One of two ways, by their cost: the products' own entries, `T m n`, or the Gram matrices of both sides,
    `T² (m + n)`, whose entrywise product sums to the same.

    Args:
        left: Shape `(B, G, T, m)`: G independent sums, of which the squares are added.
        right: Shape `(B, G, T, n)`.
        buffer: Entries that temporary tensors may have.

    Returns:
        Shape `(B,)`.
    """
    dtype = accumulation_dtype(left.dtype)
    groups, positions, m = left.shape[1:]
    n = right.shape[-1]
    if positions == 1:
        lengths = [torch.linalg.vector_norm(side, dim=-1, dtype=dtype).square() for side in (left, right)]
        return (lengths[0] * lengths[1]).sum((1, 2))
    by_gram = positions * (m + n) < m * n
    size = 2 * positions**2 if by_gram else m * n
    if left.dtype != dtype:
        size += positions * (m + n)
    squares = []
    for part in chunks(len(left), buffer // (groups * size)):
        a, b = left[part].to(dtype), right[part].to(dtype)
        if by_gram:
            squares.append(((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3)).clamp_min(0))
        else:
            squares.append(dense_square(a.mT @ b))
    return torch.cat(squares)


def lookup_square(indices: Tensor, rows: Tensor) -> Tensor:
    """Squared norms of gradients whose row `i` is the sum of the `rows` with index `i`.

    Args:
        indices: int64, shape `(B, S)`.
        rows: Shape `(B, S, d)`.

    Returns:
        Shape `(B,)`.
    """
    dtype = accumulation_dtype(rows.dtype)
    example = torch.arange(len(rows), device=rows.device)
    keys = indices + (example * (indices.max() + 1))[:, None]
    unique, slots = keys.flatten().unique(return_inverse=True)
    sums = rows.new_zeros(len(unique), rows.shape[-1], dtype=dtype)
    sums.index_add_(0, slots, rows.flatten(0, 1).to(dtype))
    owner = unique.div(indices.max() + 1, rounding_mode="floor")
    return sums.new_zeros(len(rows)).index_add_(0, owner, dense_square(sums))


def outer_lookup_product(left: Tensor, right: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Inner products of `Σ_t left_t right_tᵀ` with gradients as of `lookup_square`.

    Args:
        left: Shape `(B, T, V)`.
        right: Shape `(B, T, d)`.
        indices: int64, shape `(B, S)`, below V.
        rows: Shape `(B, S, d)`.

    Returns:
        Shape `(B,)`.
    """
    dtype = accumulation_dtype(left.dtype)
    shape = (len(left), left.shape[1], indices.shape[1])
    picked = left.gather(2, indices[:, None, :].expand(shape)).to(dtype)
    return (picked * (right.to(dtype) @ rows.to(dtype).mT)).sum((1, 2))


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, and at least one, that cover `range(length)`."""
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, length, size))


def patches(x: Tensor, window: Window, positions: Sequence[int]) -> Tensor:
    """What a convolution's kernel meets at each position, as a view of the padded input.

    Args:
        x: Shape `(..., C, *space)`, where `space` has as many dimensions as the window.
        window: The kernel's geometry.
        positions: Number of positions in each dimension of space.

    Returns:
        Shape `(..., C, *kernel, *positions)`.
    """
    padding = [amount for side in reversed(window.padding) for amount in (side, side)]
    x = functional.pad(x, padding)
    lead = x.ndim - len(positions)
    steps = x.stride()[lead:]
    shape = (*x.shape[:lead], *window.kernel, *positions)
    strides = (
        *x.stride()[:lead],
        *(step * gap for step, gap in zip(steps, window.dilation, strict=True)),
        *(step * jump for step, jump in zip(steps, window.stride, strict=True)),
    )
    return x.as_strided(shape, strides, x.storage_offset())


def unfolded(x: Tensor, g: Tensor, window: Window, groups: int) -> tuple[Tensor, Tensor]:
    """Factors of a kernel's gradients as `outer_square` takes them.

    Args:
        x: Inputs, shape `(B, k, C, *space)`: k inputs for each example.
        g: Gradients of the outputs, shape `(B, k, O, *positions)`.
        window: The kernel's geometry.
        groups: Number of groups of channels.

    Returns:
        Shapes `(B, groups, T, O / groups)` and `(B, groups, T, C / groups · kernel)`, T being k times the positions.
    """
    dims = len(window.kernel)
    seen = patches(x, window, g.shape[3:]).flatten(-dims).unflatten(2, (groups, -1)).flatten(3, -2)
    return tuple(
        side.transpose(1, 2).movedim(-1, 3).flatten(2, 3)
        for side in (g.flatten(3).unflatten(2, (groups, -1)), seen)
    )


def conv_square(x: Tensor, g: Tensor, window: Window, groups: int, buffer: int) -> Tensor:
    """Squared norms of a kernel's gradients; arguments as of `unfolded`.

    Returns:
        Shape `(B,)`.
    """
    size = g[0].numel() + x.shape[1] * x.shape[2] * prod(window.kernel) * prod(g.shape[3:])
    return torch.cat(
        [
            outer_square(*unfolded(x[part], g[part], window, groups), buffer)
            for part in chunks(len(x), buffer // size)
        ]
    )
