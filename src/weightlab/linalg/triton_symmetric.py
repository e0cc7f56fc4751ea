"""Triton kernel for symmetric matrix products on CUDA; `symmetric_products` is its reference in torch."""

# Triton is optional and not always there to be checked against.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
with contextlib.suppress(ImportError):
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

_FROM_ROWS = 256


def applies(rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a kernel that works for so many rows of this type on this device.

    Half precision only: float32 keeps cuBLAS's choice between TF32 and full precision. Small matrices
    have too few tiles for half of them to be worth a kernel.
    """
    return (
        triton is not None
        and device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and rows >= _FROM_ROWS
        and _works(dtype, device)
    )


@functools.cache
def _works(dtype: torch.dtype, device: torch.device) -> bool:
    """Compile the kernel and compare a small product; a driver or card it is not made for means torch."""
    try:
        generator = torch.Generator(device).manual_seed(0)
        X = torch.randn(_FROM_ROWS, 64, dtype=dtype, device=device, generator=generator)
        found = multiply(X, X, X.new_empty(_FROM_ROWS, _FROM_ROWS))
        return torch.allclose(found.float(), X.float() @ X.float().mT, rtol=0.02, atol=0.1)
    except Exception:
        return False


def multiply(
    A: Tensor, B: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 0.0, *, block: int = 128
) -> Tensor:
    """Set `out` to `alpha·A Bᵀ + beta·out`, all symmetric: tiles below the diagonal, mirrored above it.

    Args:
        A: Shape `(m, k)` or `(batch, m, k)`.
        B: Shape and dtype of A; A itself for a Gram matrix, or a symmetric matrix that commutes with it.
        out: Shape `(m, m)` or `(batch, m, m)`.
        alpha: Factor on the product, which is accumulated in float32.
        beta: Factor on what `out` holds; at 0 it is not read.
        block: Side of a tile: a power of two, at least 16.

    Returns:
        `out`.
    """
    a, b, c = (t if t.ndim == 3 else t.unsqueeze(0) for t in (A, B, out))
    batch, m, k = a.shape
    side = -(-m // block)
    kernel: Any = _symmetric_product
    kernel[(side * (side + 1) // 2, batch)](
        a, b, c, m, k, alpha, beta,
        *a.stride(), *b.stride(), *c.stride(),
        BLOCK=block, BLOCK_K=min(64, block), READ=beta != 0,
        num_warps=8 if block >= 128 else 4, num_stages=3,
    )  # fmt: skip
    return out


def _symmetric_product(
    a_ptr, b_ptr, c_ptr, m, k, alpha, beta,
    a_batch, a_row, a_column, b_batch, b_row, b_column, c_batch, c_row, c_column,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    # Tiles (i, j), j ≤ i, are numbered row by row. The root of the triangular number gives the row; the two
    # comparisons mend what float32 rounds.
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2

    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + batch * a_batch + rows[:, None] * a_row + inner[None, :] * a_column
    b_tile = b_ptr + batch * b_batch + columns[None, :] * b_row + inner[:, None] * b_column
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        left = k - start
        x = tl.load(a_tile, mask=(rows[:, None] < m) & (inner[None, :] < left), other=0.0)
        y = tl.load(b_tile, mask=(columns[None, :] < m) & (inner[:, None] < left), other=0.0)
        total = tl.dot(x, y, total)
        a_tile += BLOCK_K * a_column
        b_tile += BLOCK_K * b_column

    inside = (rows[:, None] < m) & (columns[None, :] < m)
    c_tile = c_ptr + batch * c_batch + rows[:, None] * c_row + columns[None, :] * c_column
    total = total * alpha
    if READ:
        total += beta * tl.load(c_tile, mask=inside, other=0.0).to(tl.float32)
    result = total.to(c_ptr.dtype.element_ty)
    tl.store(c_tile, result, mask=inside)
    if i != j:
        # The mirrored tile is nobody else's, neither to read nor to write.
        mirror = c_ptr + batch * c_batch + columns[:, None] * c_row + rows[None, :] * c_column
        tl.store(mirror, tl.trans(result), mask=(columns[:, None] < m) & (rows[None, :] < m))


if triton is not None:
    _symmetric_product = triton.jit(_symmetric_product)
