"""Orthogonal factors of matrices: Q of a QR decomposition, the polar factor, an eigenbasis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

QRBackend = Literal["householder", "cholesky"]
PolarMethod = Literal["svd", "eigh"]


def qr_factor(A: Tensor, backend: QRBackend = "householder", *, fallback: Tensor | None = None) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal, which makes it unique.

    Args:
        A: Shape `(..., m, n)` with m ≥ n, floating point. The leading dimensions are a batch.
        backend: `"householder"`: `torch.linalg.qr`, orthogonal to rounding for whatever A. `"cholesky"`:
            `cholesky_qr` of three passes, which an accelerator is faster at, being mostly products; on a CPU it
            is slower.
        fallback: What matrices that the Cholesky decomposition fails on get instead, of the shape of
            A. Default None: Householder's Q; an accelerator then waits for the host to look whether
            there are any.

    Returns:
        Shape `(..., m, n)`, at least float32. Columns that depend linearly on those before them, to
        rounding, give arbitrary directions in Q. NaN for a matrix that holds NaN.

    Raises:
        ValueError: If m < n, A is no matrix, or the backend is unknown.

    Complexity:
        Householder `4·m·n² − 4/3·n³` flops; Cholesky `9·m·n² + n³`, with which accelerators are quicker.

    Example:
        >>> qr_factor(torch.tensor([[0.0, -2.0], [3.0, 1.0]])) + 0.0
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    A = as_matrices(A, "qr_factor")
    if A.size(-2) < A.size(-1):
        raise ValueError(f"qr_factor needs at least as many rows as columns, got shape {tuple(A.shape)}")
    if backend == "householder":
        return _householder(A)
    if backend != "cholesky":
        raise ValueError(f'backend must be "householder" or "cholesky", got {backend!r}')
    Q, good = cholesky_qr(A)
    good = good[..., None, None]
    if fallback is not None:
        return torch.where(good, Q, fallback)
    return Q if bool(good.all()) else torch.where(good, Q, _householder(A))


def _householder(A: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(A)
    return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def cholesky_qr(A: Tensor, passes: int = 3, shift: float | None = None) -> tuple[Tensor, Tensor]:
    """Q of a QR decomposition by Cholesky decompositions of Gram matrices, and where that succeeded.

    A pass is `AᵀA = L·Lᵀ`, `Q = A·L⁻ᵀ`. It squares the condition number κ, so in float32 one leaves an error
    ‖QᵀQ − I‖ of about 1e-3 for κ = 10 and of order 1 for κ = 1e3. The first pass adds `shift·‖A‖_F²` to the
    diagonal, which lets it succeed and leave a matrix that the next passes can deal with: two are enough up
    to κ of about 1e2, three (the default) up to about 1e5 in float32. None of them reads a value back to the host.

    Args:
        A: Shape `(..., m, n)` with m ≥ n, floating point.
        passes: Number of passes. 1 is plain shifted Cholesky QR, 2 is CholeskyQR2.
        shift: Relative to the squared Frobenius norm of each matrix. Default None: 4 units of rounding.

    Returns:
        `(Q, good)`: at least float32; a boolean of shape `(...)`, whether all decompositions went
        through and, with two passes or more, the last began with a matrix near an orthogonal one.

    Raises:
        ValueError: If m < n, A is no matrix, `passes` is below 1 or `shift` below 0.

    Complexity:
        `3·m·n² + n³/3` flops a pass.

    References:
        Shifted CholeskyQR for computing the QR factorization of ill-conditioned matrices, arXiv 1809.11085.

    Example:
        >>> Q, good = cholesky_qr(torch.tensor([[3.0, 0.0], [4.0, 5.0]]))
        >>> Q, good
        (tensor([[ 0.6000, -0.8000],
                [ 0.8000,  0.6000]]), tensor(True))
    """
    Q = as_matrices(A, "cholesky_qr")
    if Q.size(-2) < Q.size(-1):
        raise ValueError(f"cholesky_qr needs at least as many rows as columns, got shape {tuple(A.shape)}")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    if shift is None:
        shift = 4 * torch.finfo(Q.dtype).eps
    elif not shift >= 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    norm = torch.linalg.vector_norm(Q, dim=(-2, -1), keepdim=True)
    Q = Q / norm.clamp_min(torch.finfo(Q.dtype).tiny)
    good = norm[..., 0, 0] > 0
    identity = torch.eye(Q.size(-1), dtype=Q.dtype, device=Q.device)
    for index in range(passes):
        gram = Q.mT @ Q
        if index == 0:
            gram = gram + shift * identity
        L, info = torch.linalg.cholesky_ex(gram)
        good = good & (info == 0)
        if index > 0 and index == passes - 1:
            good = good & (torch.linalg.vector_norm(gram - identity, dim=(-2, -1)) < 0.5)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    return Q, good & Q.isfinite().all(-1).all(-1)


def polar_factor(A: Tensor, method: PolarMethod = "svd") -> Tensor:
    """The nearest matrix with orthonormal columns (or rows), `U·Vᵀ` of the SVD `U·S·Vᵀ`.

    Args:
        A: Shape `(..., m, n)`, floating point. The leading dimensions are a batch.
        method: `"svd"`: orthogonal to rounding for whatever A. `"eigh"`: by the eigenvalues of the
            Gram matrix of the short side in float64, and one Newton-Schulz step; quicker on
            accelerators, good up to a condition number of about 1e6, and zero on the null space of A.

    Returns:
        Shape of A, at least float32. NaN for a matrix that holds NaN or infinity, without touching others.

    Raises:
        ValueError: If A is no matrix, or the method is unknown.

    Complexity:
        Cubic in the short side, linear in the long one.

    Example:
        >>> polar_factor(torch.tensor([[0.0, -2.0], [5.0, 0.0]]), "eigh")
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """
    A = as_matrices(A, "polar_factor")
    if method not in ("svd", "eigh"):
        raise ValueError(f'method must be "svd" or "eigh", got {method!r}')
    A, finite = zero_nonfinite(A)
    if method == "svd":
        U, _, Vh = thin_svd(A)
        polar = U @ Vh
    else:
        wide = A if A.size(-2) <= A.size(-1) else A.mT
        double = wide.double()
        values, vectors = torch.linalg.eigh(double @ double.mT)
        largest = values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
        roots = torch.where(values > largest * 1e-14, values, torch.inf).rsqrt()
        polar = ((vectors * roots.unsqueeze(-2)) @ vectors.mT @ double).to(A.dtype)
        polar = 1.5 * polar - 0.5 * (polar @ polar.mT) @ polar
        polar = polar if wide is A else polar.mT
    return torch.where(finite, polar, torch.nan)


def eigenbasis(S: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices as columns, those of the largest eigenvalues first.

    Args:
        S: Shape `(..., n, n)`, symmetric, floating point.

    Returns:
        Shape of S, at least float32. Signs are arbitrary, as are directions within the space of
        equal eigenvalues. NaN for a matrix that holds NaN or infinity, without touching others.

    Raises:
        ValueError: If the matrices are not square.

    Complexity:
        About `9·n³` flops.

    Example:
        >>> eigenbasis(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    S = as_matrices(S, "eigenbasis")
    if S.size(-2) != S.size(-1):
        raise ValueError(f"eigenbasis needs square matrices, got shape {tuple(S.shape)}")
    S, finite = zero_nonfinite(S)
    return torch.where(finite, torch.linalg.eigh(S).eigenvectors.flip(-1), torch.nan)


def as_matrices(A: Tensor, name: str) -> Tensor:
    """`A` in at least float32, or an error on behalf of the function `name` if it holds no real matrices."""
    if not A.is_floating_point():
        raise TypeError(f"{name} needs a real floating-point tensor, got {A.dtype}")
    if A.ndim < 2:
        raise ValueError(f"{name} needs matrices of shape (..., m, n), got {tuple(A.shape)}")
    return A.to(torch.promote_types(A.dtype, torch.float32))


def thin_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd` without full matrices, and once more where it does not converge.

    LAPACK's divide and conquer gives up on some float32 matrices with all but equal singular values, as orthogonal ones after a
    small step have. Transposed and in float64 they are no trouble.
    """
    if torch.compiler.is_compiling():
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        return U, s, Vh
    try:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        V, s, Uh = torch.linalg.svd(A.mT.double(), full_matrices=False)
        U, s, Vh = Uh.mT.to(A.dtype), s.to(A.dtype), V.mT.to(A.dtype)
    return U, s, Vh


def zero_nonfinite(A: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros for matrices that LAPACK would raise an error for, and which are not among them."""
    finite = A.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(finite, A, 0), finite
