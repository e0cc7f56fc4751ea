"""How far matrices are from having orthonormal rows or columns."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if X.ndim < 2:
        raise ValueError(f"orthogonality_error needs matrices of shape (..., m, n), got {tuple(X.shape)}")
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    gram = X.mT @ X if X.size(-2) > X.size(-1) else X @ X.mT
    identity = torch.eye(gram.size(-1), dtype=gram.dtype, device=gram.device)
    return torch.linalg.vector_norm(gram - identity, dim=(-2, -1)) / gram.size(-1) ** 0.5
