"""How far matrices are from having orthonormal rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonality_deviation(X: Tensor) -> Tensor:
    """`‖XXᵀ − I‖_F` for m ≤ n, else `‖XᵀX − I‖_F`: the norm of `σ² − 1` over the singular values σ of each matrix.

    Differentiable: the gradient is `2(XXᵀ − I)X / D`, and 0 where D is exactly 0.

    Args:
        X: Shape `(..., m, n)`, floating point. The Gram matrix is that of the short side, in float32 at least.

    Returns:
        Shape `(...)`, at least float32.

    Raises:
        ValueError: If `X` has fewer than two dimensions.

    Complexity:
        `2·m²·n` flops a matrix, for m ≤ n.

    Example:
        >>> orthogonality_deviation(torch.eye(2, 3)), orthogonality_deviation(2 * torch.eye(4))
        (tensor(0.), tensor(6.))
    """
    if X.ndim < 2:
        raise ValueError(f"orthogonality needs matrices of shape (..., m, n), got {tuple(X.shape)}")
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    gram = X.mT @ X if X.size(-2) > X.size(-1) else X @ X.mT
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    return torch.linalg.vector_norm(gram - identity, dim=(-2, -1))


def orthogonality_error(X: Tensor) -> Tensor:
    """Root mean square of `σ² − 1` over the singular values σ of each matrix.

    That is `‖XXᵀ − I‖_F / √m` for m ≤ n, and `‖XᵀX − I‖_F / √n` otherwise: 0 for a semi-orthogonal
    matrix, 1 for a zero matrix.

    Args:
        X: Shape `(..., m, n)`, floating point.

    Returns:
        Shape `(...)`, at least float32.

    Raises:
        ValueError: If `X` has fewer than two dimensions.

    Complexity:
        `2·m²·n` flops a matrix, for m ≤ n.

    Example:
        >>> orthogonality_error(torch.eye(2, 3)), orthogonality_error(torch.zeros(4, 3))
        (tensor(0.), tensor(1.))
    """
    return orthogonality_deviation(X) / min(X.shape[-2:]) ** 0.5
