"""Squared norms of per-example gradients, from the factors that backpropagation multiplies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight


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


def outer_lookup_product(left: Tensor, right: Tensor, indices: Tensor, rows: Tensor, buffer: int) -> Tensor:
    """Inner products of `Σ_t left_t right_tᵀ` with gradients as of `lookup_square`.

    Args:
        left: Shape `(B, T, V)`.
        right: Shape `(B, T, d)`.
        indices: int64, shape `(B, S)`, below V.
        rows: Shape `(B, S, d)`.
        buffer: Entries that temporary tensors may have.

    Returns:
        Shape `(B,)`.
    """
    dtype = accumulation_dtype(left.dtype)
    shape = (len(left), left.shape[1], indices.shape[1])
    products = []
    for part in chunks(len(left), buffer // (2 * shape[1] * shape[2])):
        picked = left[part].gather(2, indices[part, None].expand(-1, *shape[1:])).to(dtype)
        products.append((picked * (right[part].to(dtype) @ rows[part].to(dtype).mT)).sum((1, 2)))
    return torch.cat(products)


def conv_square(pairs: Sequence[tuple[Tensor, Tensor]], window: Window, groups: int, buffer: int) -> Tensor:
    """Squared norms of the gradients of a convolution's kernel.

    One of two ways, by their cost: the gradients themselves, some examples at a time, or the Gram matrices of the
    pixels of inputs and outputs. The Gram matrix of the patches that the kernel meets is a sum of shifted parts of
    that of the pixels.

    Args:
        pairs: For each use of the kernel its inputs, shape `(B, k, C, *space)`, and the gradients of the outputs, shape
            `(B, k, O, *positions)`: k inputs for each example.
        window: The kernel's geometry.
        groups: Number of groups of channels.
        buffer: Entries that temporary tensors may have.

    Returns:
        Shape `(B,)`.
    """
    x, g = pairs[0]
    dtype = accumulation_dtype(x.dtype)
    taps, positions = prod(window.kernel), prod(g.shape[3:])
    pixels = prod(n + 2 * padding for n, padding in zip(x.shape[3:], window.padding, strict=True))
    channels = x.shape[2] // groups
    # A step of the sum over shifted parts takes as long as some eight multiplications.
    by_pixels = pixels**2 * channels + positions**2 * (g.shape[2] // groups + 8 * taps)
    direct = positions * channels * taps * g.shape[2] // groups
    if len(pairs) == 1 and x.shape[1] == 1 and by_pixels < direct:
        size = groups * (pixels**2 + 3 * positions**2)
        return torch.cat(
            [
                _conv_square_by_pixels(x[part, 0].to(dtype), g[part, 0].to(dtype), window, groups)
                for part in chunks(len(x), buffer // size)
            ]
        )
    size = g.shape[2] * channels * taps
    if x.dtype != dtype:
        size += x[0].numel() + g[0].numel()
    squares = []
    for part in chunks(len(x), buffer // size):
        gradients = [kernel_gradients(a[part].to(dtype), b[part].to(dtype), window, groups) for a, b in pairs]
        squares.append(dense_square(gradients[0] if len(pairs) == 1 else torch.stack(gradients).sum(0)))
    return torch.cat(squares)


def kernel_gradients(x: Tensor, g: Tensor, window: Window, groups: int) -> Tensor:
    """Each example's gradient of a convolution's kernel, by one convolution with a group of channels an example.

    Args:
        x: Shape `(B, k, C, *space)`.
        g: Shape `(B, k, O, *positions)`.
        window: The kernel's geometry.
        groups: Number of groups of channels.

    Returns:
        Shape `(B, O, C / groups, *kernel)`.
    """
    # Annotated for a whole number; takes tuples, too.
    gradient: Any = (conv1d_weight, conv2d_weight, conv3d_weight)[len(window.kernel) - 1]
    return gradient(
        x.transpose(0, 1).flatten(1, 2),
        (len(x) * g.shape[2], x.shape[2] // groups, *window.kernel),
        g.transpose(0, 1).flatten(1, 2),
        window.stride,
        window.padding,
        window.dilation,
        len(x) * groups,
    ).unflatten(0, (len(x), -1))


def _conv_square_by_pixels(x: Tensor, g: Tensor, window: Window, groups: int) -> Tensor:
    """As `conv_square`, of inputs `(B, C, *space)` and gradients `(B, O, *positions)`."""
    x = functional.pad(x, [amount for side in reversed(window.padding) for amount in (side, side)])
    space, positions = x.shape[2:], g.shape[2:]
    x, g = (side.unflatten(1, (groups, -1)).flatten(3) for side in (x, g))
    pixels = (x.mT @ x).unflatten(3, space).unflatten(2, space)
    patches = pixels.new_zeros(*x.shape[:2], *positions, *positions)
    steps = list(zip(positions, window.stride, window.dilation, strict=True))
    for tap in itertools.product(*map(range, window.kernel)):
        place = [
            slice(i * dilation, i * dilation + stride * (n - 1) + 1, stride)
            for i, (n, stride, dilation) in zip(tap, steps, strict=True)
        ]
        patches += pixels[(..., *place, *place)]
    return (patches.flatten(2) * (g.mT @ g).flatten(2)).sum((1, 2)).clamp_min(0)


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`, and at least one, that cover `range(length)`."""
    size = max(1, size)
    return (slice(start, start + size) for start in range(0, length, size))
