"""The matrix sign (polar factor) of rectangular matrices by polynomial iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightlab.linalg.coefficients import CoefficientSet, Triple, resolve_coefficients


def newton_schulz(
    X: Tensor,
    coefficients: str | CoefficientSet | Sequence[Sequence[float]] = "muon",
    steps: int | None = None,
    *,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Push all singular values of each matrix towards one and keep the singular vectors.

    With :math:`X = U S V^\top`, returns :math:`U p(S / \lVert X \rVert_F) V^\top`, where :math:`p` is the
    composition of the steps' polynomials :math:`a s + b s^3 + c s^5`. Only matrix products are used:
    :math:`A = X X^\top`, then :math:`X \leftarrow a X + (b A + c A^2) X`, on the short side.

    A zero matrix stays zero; a matrix that holds NaN or infinity becomes NaN, other matrices of the
    batch are untouched by it.

    Args:
        X: Shape `(..., m, n)`, floating point. The leading dimensions are a batch.
        coefficients: A name out of `COEFFICIENTS`, a `CoefficientSet`, or a sequence of `(a, b, c)`, one
            per step; a sequence of one triple is used at every step.
        steps: Number of steps; `None` takes the set's own (5 for the sets made for optimizers), or the
            length of the sequence.
        eps: Added to the Frobenius norm before the division. Default 1e-7, as in Muon.
        dtype: Type to iterate in; `None` keeps that of `X`. bfloat16 halves the cost where the device
            has it natively and can be slower where it has not.

    Returns:
        A new tensor with the shape, dtype and device of `X`. The norm is taken in float32 (float64
        for float64 input) per matrix whatever the types.

    Raises:
        TypeError: If `X` is not a floating-point tensor.
        ValueError: If `X` has fewer than two dimensions, or coefficients or steps are unusable.

    Complexity:
        For m ≤ n each step takes `4·m²·n + 2·m³` flops a matrix (`2·m³` less where c = 0).

    References:
        Polynomials and their sources are in `COEFFICIENTS`.

    Example:
        >>> X = torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
        >>> newton_schulz(X, "cubic").round(decimals=4) + 0.0
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    if not X.is_floating_point():
        raise TypeError(f"newton_schulz needs a real floating-point tensor, got {X.dtype}")
    if X.ndim < 2:
        raise ValueError(f"newton_schulz needs matrices of shape (..., m, n), got {tuple(X.shape)}")
    chosen = resolve_coefficients(coefficients)
    schedule = chosen.schedule(steps, (X.size(-2), X.size(-1)))
    if X.numel() == 0:
        return X.clone()

    matrices = X.mT if X.size(-2) > X.size(-1) else X
    matrices = matrices.to(torch.promote_types(X.dtype, torch.float32))
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    matrices = (matrices / (norm * chosen.safety + eps)).to(dtype or X.dtype)
    matrices = _iterate(matrices, schedule).to(X.dtype)
    return matrices.mT if X.size(-2) > X.size(-1) else matrices


def _iterate(X: Tensor, schedule: tuple[Triple, ...]) -> Tensor:
    """Apply the polynomials to wide matrices of shape (..., m, n) whose singular values are at most 1."""
    shape = X.shape
    if X.ndim > 3:
        X = X.flatten(0, -3)
    multiply_add = torch.addmm if X.ndim == 2 else torch.baddbmm
    for a, b, c in schedule:
        A = X @ X.mT
        if c == 0:
            X = multiply_add(X, A, X, beta=a, alpha=b)
        else:
            X = multiply_add(X, multiply_add(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.view(shape)
