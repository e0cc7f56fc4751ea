"""Matrix products known to be symmetric, of which one triangle is computed and mirrored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CPU_FROM = 512
_LEAST_ROWS = 8


def relative_cost(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Time of a symmetric product over that of the plain one, for matrices with so many rows.

    1 where only the plain one is at hand. Measured, not counted: `benchmarks/linalg.py` prints it. For a
    CPU, four strips make 5/8 of the flops, and mirroring costs the more the faster the products are.
    """
    if torch.compiler.is_compiling():
        return 1.0
    if device.type == "cpu" and rows >= _CPU_FROM:
        if dtype in (torch.float32, torch.float64):
            return 0.68
        return 0.85 if rows < 768 else 0.75
    if device.type == "cuda":
        from weightlab.linalg import triton_symmetric

        if triton_symmetric.applies(rows, dtype, device):
            return 0.6
    return 1.0


def gram(X: Tensor) -> Tensor:
    """`X Xᵀ`, computing about half of it.

    On a CPU in horizontal strips, from the diagonal on to the right; on CUDA by a Triton kernel where that is
    installed and made for the type; else, and where a gradient is asked for, by the plain product.

    Args:
        X: Shape `(..., m, n)`, floating point.

    Returns:
        Shape `(..., m, m)`.

    Complexity:
        5/8 of `2·m²·n` flops a matrix on a CPU, and little more than half on CUDA.

    Example:
        >>> X = torch.arange(6.0).view(2, 3)
        >>> torch.equal(gram(X), X @ X.T)
        True
    """
    if _plain((X,)):
        return X @ X.mT
    out = X.new_empty(*X.shape[:-1], X.size(-2))
    if X.device.type == "cuda":
        from weightlab.linalg import triton_symmetric

        return triton_symmetric.multiply(X, X, out)
    for x, y in zip(_matrices(X), _matrices(out), strict=True):
        for start, stop in _strips(x):
            torch.mm(x[start:stop], x[start:].mT, out=y[start:stop, start:])
            y[stop:, start:stop] = y[start:stop, stop:].mT
    return out


def symmetric_product(
    A: Tensor, B: Tensor, plus: Sequence[tuple[float | Tensor, Tensor]] = (), alpha: float = 1.0
) -> Tensor:
    """`alpha·A B + Σ factor·M` for symmetric matrices of which A and B commute, so that the result is symmetric.

    Symmetry is taken on trust: one triangle is computed, the other one mirrored.

    Args:
        A: Shape `(m, m)` or `(batch, m, m)`.
        B: Shape and dtype of A.
        plus: `(factor, M)` pairs: a number, or a tensor that broadcasts against M, shape and dtype of A.
        alpha: Factor on the product.

    Returns:
        A new tensor with shape and dtype of A.

    Complexity:
        As `gram` of a square matrix.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> symmetric_product(A, A, plus=[(1.0, torch.eye(2))], alpha=0.5)
        tensor([[3.5000, 2.0000],
                [2.0000, 3.5000]])
    """
    if not _plain((A, B, *(M for _, M in plus))) and A.device.type == "cpu":
        return _in_strips(A, B, plus, alpha)
    total: Tensor | None = None
    if len(plus) == 1 and not isinstance(plus[0][0], Tensor) and _plain((A, B)):
        multiply_add = torch.addmm if A.ndim == 2 else torch.baddbmm
        return multiply_add(plus[0][1], A, B, beta=plus[0][0], alpha=alpha)
    for factor, M in plus:
        # In the wider of the types; rounded once, when all are added.
        total = factor * M if total is None else total + factor * M
    if total is not None:
        total = total.to(A.dtype)
    if not _plain((A, B)):
        from weightlab.linalg import triton_symmetric

        out = torch.empty_like(A) if total is None else total.contiguous()
        return triton_symmetric.multiply(A, B, out, alpha=alpha, beta=0.0 if total is None else 1.0)
    if total is None:
        return A @ B if alpha == 1 else alpha * (A @ B)
    return (torch.addmm if A.ndim == 2 else torch.baddbmm)(total, A, B, alpha=alpha)


def _in_strips(A: Tensor, B: Tensor, plus: Sequence[tuple[float | Tensor, Tensor]], alpha: float) -> Tensor:
    out = torch.empty_like(A, memory_format=torch.contiguous_format)
    for i, (a, b, c) in enumerate(zip(_matrices(A), _matrices(B), _matrices(out), strict=True)):
        terms = [
            (
                float(f.flatten()[min(i, f.numel() - 1)]) if isinstance(f, Tensor) else f,
                M if M.ndim == 2 else M[i],
            )
            for f, M in plus
        ]
        for start, stop in _strips(a):
            left, right, strip = a[start:stop], b[start:].mT, c[start:stop, start:]
            if not terms:
                torch.mm(left, right, out=strip)
                if alpha != 1:
                    strip.mul_(alpha)
            else:
                factor, M = terms[0]
                torch.addmm(M[start:stop, start:], left, right, beta=factor, alpha=alpha, out=strip)
                for factor, M in terms[1:]:
                    strip.add_(M[start:stop, start:], alpha=factor)
            c[stop:, start:stop] = c[start:stop, stop:].mT
    return out


def _plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether there is nothing but the plain product for these."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    first = tensors[0]
    if first.device.type == "cuda":
        from weightlab.linalg import triton_symmetric

        return not triton_symmetric.applies(first.size(-2), first.dtype, first.device)
    return first.device.type != "cpu" or first.size(-2) < 2 * _LEAST_ROWS or first.numel() == 0


def _matrices(X: Tensor) -> tuple[Tensor, ...]:
    return X.unbind() if X.ndim == 3 else (X,)


def _strips(X: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the rows into strips with edges at multiples of 8.

    More strips save more flops; below some hundred rows, and sooner in half precision, a product takes
    its time for packing.
    """
    rows = X.size(0)
    count = min(8 if rows >= 768 and X.element_size() > 2 else 4, rows // _LEAST_ROWS)
    edges = [rows * i // count // _LEAST_ROWS * _LEAST_ROWS for i in range(count)]
    yield from zip(edges, [*edges[1:], rows], strict=True)
