"""Matrices brought within a distance of orthogonality: a polar factor that keeps as much of the singular values as it may."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weightlab.linalg.orthogonal_factor import as_matrices, thin_svd, zero_nonfinite
from weightlab.linalg.orthogonality import orthogonality_deviation

RelaxedPolarMethod = Literal["svd", "polar"]


def relaxed_polar_factor(A: Tensor, tol: float, *, method: RelaxedPolarMethod = "svd") -> Tensor:
    r"""Shrink the Gram matrix's deviation from the identity to `tol`, keeping singular vectors.

    With :math:`D = \|\sigma^2 - 1\|` over the singular values, see `orthogonality_deviation`, they become
    :math:`\sqrt{1 + c\,(\sigma^2 - 1)}` where :math:`c = \min(1, \mathrm{tol} / D)`. The deviation becomes
    :math:`\min(D, \mathrm{tol})`: A itself, bit for bit, where it is within the tolerance already, and the polar factor
    for `tol=0`. The result is a feasible point at the price of one decomposition; the nearest it is not.

    Differentiable once. The backward pass is written in divided differences of the map of singular values, which are finite
    for equal singular values too, where derivatives of singular vectors are not. It leaves out pairs of singular values
    which are both zero: there the map has no derivative.

    Args:
        A: Shape `(..., m, n)`, floating point. The leading dimensions are a batch.
        tol: At least 0; infinity for no limit.
        method: `"svd"`: to rounding for whatever A. `"polar"`: by the eigenvalues of the Gram matrix of the short side in
            float64, which is quicker for matrices much longer than wide; good up to a condition number of about 1e6, and
            zero on the null space of A.

    Returns:
        Shape of A, at least float32. NaN for a matrix that holds NaN or infinity, without touching others.

    Raises:
        TypeError: If A is not of real floating-point type.
        ValueError: If A is no matrix, `tol` is below 0 or the method is unknown.

    Complexity:
        Cubic in the short side, linear in the long one. On a CPU, matrices which are all within the tolerance cost their Gram
        matrix only; elsewhere that would make the device wait for the host.

    Reference:
        The map of singular values is derived from the tolerance of "λ-Orthogonality Regularization for Compatible
        Representation Learning", arXiv 2509.16664, which states it as a penalty.

    Example:
        >>> relaxed_polar_factor(torch.diag(torch.tensor([2.0, 1.0])), tol=1.25)
        tensor([[1.5000, 0.0000],
                [0.0000, 1.0000]])
    """
    A = as_matrices(A, "relaxed_polar_factor")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if method not in ("svd", "polar"):
        raise ValueError(f'method must be "svd" or "polar", got {method!r}')
    if math.isinf(tol):
        return A
    if tol == 0:
        return _RelaxedPolar.apply(A, tol, method)[0]
    inside = orthogonality_deviation(A.detach()) <= tol
    plain = not torch.compiler.is_compiling() and torch.func.debug_unwrap(A) is A
    if plain and A.device.type == "cpu" and bool(inside.all()):
        return A
    return torch.where(inside[..., None, None], A, _RelaxedPolar.apply(A, tol, method)[0])


class _RelaxedPolar(torch.autograd.Function):
    """The map for matrices outside the tolerance, and what its backward pass needs: U, σ and Vᵀ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, tol: float, method: RelaxedPolarMethod) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        A, finite = zero_nonfinite(A)
        if method == "svd":
            U, s, Vh = thin_svd(A)
        else:
            U, s, Vh = _triples_by_gram(A)
        kept, _ = _kept(s, tol)
        result = (U * _mapped(s, kept).unsqueeze(-2)) @ Vh
        return torch.where(finite, result, torch.nan), U, s, Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, U, s, Vh = output
        ctx.tol = inputs[1]
        ctx.mark_non_differentiable(U, s, Vh)
        ctx.save_for_backward(U, s, Vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_outputs[0]
        U, s, Vh = ctx.saved_tensors
        kept, D = _kept(s, ctx.tol)
        f = _mapped(s, kept)
        c = kept[..., None, None]
        inner = U.mT @ grad @ Vh.mT
        symmetric, skew = (inner + inner.mT) / 2, (inner - inner.mT) / 2
        s_sums, f_sums = s.unsqueeze(-1) + s.unsqueeze(-2), f.unsqueeze(-1) + f.unsqueeze(-2)
        # (f_i - f_j)/(s_i - s_j) is c (s_i + s_j)/(f_i + f_j), which has no difference to divide by.
        core = c * _ratio(s_sums, f_sums) * symmetric + _ratio(f_sums, s_sums) * skew
        # c depends on all singular values through D.
        slope = (inner.diagonal(dim1=-2, dim2=-1) * (s.square() - 1) * _ratio(torch.ones_like(f), f)).sum(-1)
        by_norm = -slope * ctx.tol * D.clamp_min(torch.finfo(D.dtype).tiny ** 0.25).pow(-3)
        core = core + torch.diag_embed(by_norm.unsqueeze(-1) * (s.square() - 1) * s)
        result = U @ core @ Vh
        # What lies beyond the space of the short side's singular vectors.
        stretch = _ratio(f, s)
        m, n = grad.shape[-2:]
        if m < n:
            result = result + (U * stretch.unsqueeze(-2)) @ (U.mT @ grad - inner @ Vh)
        elif m > n:
            result = result + (grad @ Vh.mT - U @ inner) @ (stretch.unsqueeze(-1) * Vh)
        return result, None, None


def _kept(s: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """The factor c on σ² − 1, and the deviation D, of each matrix."""
    D = torch.linalg.vector_norm(s.square() - 1, dim=-1)
    return (tol / D.clamp_min(torch.finfo(D.dtype).tiny)).clamp_max(1.0), D


def _mapped(s: Tensor, kept: Tensor) -> Tensor:
    return (1 + kept.unsqueeze(-1) * (s.square() - 1)).clamp_min(0).sqrt()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0 within rounding."""
    rounding = 4 * torch.finfo(b.dtype).eps
    return torch.where(b > rounding, a / b.clamp_min(rounding), 0)


def _triples_by_gram(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tall = A.size(-2) > A.size(-1)
    wide = A.mT.double() if tall else A.double()
    values, U = torch.linalg.eigh(wide @ wide.mT)
    largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    values = torch.where(values > largest * 1e-14, values, 0)
    s = values.sqrt()
    Vh = torch.where(values > 0, values, torch.inf).rsqrt().unsqueeze(-1) * (U.mT @ wide)
    left, right = (Vh.mT, U.mT) if tall else (U, Vh)
    return left.to(A.dtype), s.to(A.dtype), right.to(A.dtype)
