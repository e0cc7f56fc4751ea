"""The largest singular triples of a matrix, by randomized subspace iteration that knows how good it is."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SVDMethod = Literal["auto", "full", "randomized"]

# Below this many singular values, or with a block wider than this share of them, the full decomposition is
# about as quick as products and re-orthogonalisations are.
_SMALL = 256
_WIDE = 0.25
# Vectors of the power iteration that measures what a block has left out.
_PROBES = 8


class Certificate(NamedTuple):
    """How good leading singular triples are. Tensors have the batch shape of the matrix.

    Attributes:
        error: Estimate of the largest relative error of the r singular values, which are never too large; rounding,
            a few units of the largest, is not counted. 0 for full decompositions.
        residual: Largest ‖W v − s u‖ over the r triples, divided by the largest singular value. (‖Wᵀu − s v‖ is
            0 by construction.)
        outside: Spectral norm of what the triples leave over, W − U diag(S) Vh: an estimate of the
            (r + 1)-th singular value. Compare it with the last of S: near it, the subspace is not well defined.
        energy: Share of the squared Frobenius norm that the triples hold; 1 for a zero matrix.
        exact: Whether the triples come from a full decomposition.
        passed: Whether `error` is within the tolerance.
    """

    error: Tensor
    residual: Tensor
    outside: Tensor
    energy: Tensor
    exact: Tensor
    passed: Tensor


class TopSVD(NamedTuple):
    """Leading singular triples.

    Attributes:
        U: Left singular vectors as columns, shape `(..., m, r)`.
        S: Singular values in descending order, shape `(..., r)`.
        Vh: Right singular vectors as rows, shape `(..., r, n)`.
        certificate: How good they are.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    certificate: Certificate


@torch.no_grad()
def top_svd(
    W: Tensor,
    r: int,
    method: SVDMethod = "auto",
    *,
    tol: float = 1e-4,
    oversampling: int | None = None,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> TopSVD:
    r"""The r largest singular values of matrices with their vectors.

    The randomized method multiplies a block of r + oversampling orthonormal vectors by W and its transpose in
    turn, orthogonalising between, until a certificate holds: the triples (u, s, v) of the block satisfy
    :math:`W^\top u = s v` exactly and :math:`W v = s u` up to a residual of norm ρ, and with e the spectral norm of
    W outside the block, to second order in the residuals,

    .. math:: \sigma^2 \le \lambda_{\max} \begin{pmatrix} s^2 + \rho^2 & \rho e \\ \rho e & e^2 \end{pmatrix}
        \approx s^2 + \frac{\rho^2 s^2}{s^2 - e^2}.

    e is measured by a power iteration of its own. On a spectrum that falls off, a few iterations are enough; on one
    that is flat around the r-th singular value, s and e are near each other, and the certificate says so.

    Args:
        W: Shape `(..., m, n)`, floating point, any strides. The leading dimensions are a batch.
        r: Number of triples, 1 to min(m, n).
        method: `"full"`: LAPACK's or the device's full decomposition, cut. `"randomized"`: as above, with a
            RuntimeWarning for matrices whose certificate fails. `"auto"` (default): randomized where it
            pays, full where the matrix is small or r a large part of it, and for matrices whose
            certificate fails or can be seen to be about to.
        tol: Largest relative error of a singular value that the certificate allows.
        oversampling: Vectors in the block beyond r. Default None: r or 16, whichever is more. The error falls by
            (σ at the block's end / σ at r)⁴ at each iteration.
        iterations: At most so many, of two products each.
        generator: Draws the first block, on its own device. Default None: one with a fixed seed, so that
            equal matrices have equal results.

    Returns:
        At least float32 (half precision is converted first), on the device of W. Signs are fixed: the entry of
        u that is largest in magnitude is positive. Vectors to singular values that are equal, or zero, are
        arbitrary within their space, and orthonormal. No gradient flows through.

    Raises:
        TypeError: If W is not real floating point.
        ValueError: If W is no matrix, on the meta device, empty or holds NaN or infinity, or an option is out of
            range.

    Complexity:
        Full: of order `m·n·min(m, n)` whatever r. Randomized: `4·m·n·q + 6·(m + n)·q²` flops an iteration, with
        q = r + oversampling, the certificate included. Matrices of a batch are iterated one after another, so that none
        depends on the others. A device other than the CPU is waited for at each iteration.

    References:
        Finding structure with randomness: probabilistic algorithms for constructing approximate matrix
        decompositions, arXiv 0909.4061.

    Example:
        >>> U, S, Vh, certificate = top_svd(torch.tensor([[0.0, -2.0], [5.0, 0.0]]), 1)
        >>> S, U[:, 0].abs(), certificate.outside
        (tensor([5.]), tensor([0., 1.]), tensor(2.))
        >>> flat, steep = torch.linspace(1, 0.9, 300).diag(), (0.8 ** torch.arange(300)).diag()
        >>> top_svd(flat, 4).certificate.exact, top_svd(steep, 4).certificate.exact
        (tensor(True), tensor(False))
    """
    A = _checked(W, r, method, tol, oversampling, iterations)
    m, n = A.shape[-2:]
    if method == "auto" and (min(m, n) <= _SMALL or _block(r, oversampling, min(m, n)) > _WIDE * min(m, n)):
        method = "full"
    matrices = A.reshape(-1, m, n)
    if method == "full":
        U, S, Vh, certificate = _full(matrices, r)
    else:
        U, S, Vh, certificate = _stacked(
            [_one(matrix, r, method, tol, oversampling, iterations, generator) for matrix in matrices]
        )
    if not bool(certificate.passed.all()):
        warnings.warn(
            f"top_svd: the spectrum is too flat around singular value {r} for {iterations} iterations: estimated "
            f"relative error {float(certificate.error.max()):.2g}, tolerance {tol:g}; use "
            'method="full" or "auto", or more oversampling or iterations',
            RuntimeWarning,
            stacklevel=3,
        )
    U, Vh = _signed(U, Vh)
    batch = A.shape[:-2]
    return TopSVD(
        U.reshape(*batch, m, r),
        S.reshape(*batch, r),
        Vh.reshape(*batch, r, n),
        Certificate(*(field.reshape(batch) for field in certificate)),
    )


def _checked(W: Tensor, r: int, method: str, tol: float, oversampling: int | None, iterations: int) -> Tensor:
    if not W.is_floating_point():
        raise TypeError(f"top_svd needs a real floating-point tensor, got {W.dtype}")
    if W.ndim < 2:
        raise ValueError(f"top_svd needs matrices of shape (..., m, n), got {tuple(W.shape)}")
    if W.numel() == 0:
        raise ValueError(f"top_svd needs at least one entry, got shape {tuple(W.shape)}")
    if W.is_meta:
        raise ValueError("top_svd needs values, but W is on the meta device; load the weights first")
    if not 1 <= r <= min(W.shape[-2:]):
        raise ValueError(f"r must be in 1..{min(W.shape[-2:])} for shape {tuple(W.shape)}, got {r}")
    if method not in ("auto", "full", "randomized"):
        raise ValueError(f'method must be "auto", "full" or "randomized", got {method!r}')
    if not tol > 0:
        raise ValueError(f"tol must be above 0, got {tol}")
    if oversampling is not None and oversampling < 0:
        raise ValueError(f"oversampling must be at least 0, got {oversampling}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    # One pass that settles it unless the sum overflows.
    if not bool(W.sum(dtype=torch.promote_types(W.dtype, torch.float32)).isfinite() or W.isfinite().all()):
        raise ValueError(
            "W holds NaN or infinity, which has no singular values; look for a broken checkpoint"
        )
    return W.detach().to(torch.promote_types(W.dtype, torch.float32))


def _block(r: int, oversampling: int | None, k: int) -> int:
    """Vectors in the block."""
    return min(k, r + (max(16, r) if oversampling is None else oversampling))


def _full(A: Tensor, r: int) -> TopSVD:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    zero = S.new_zeros(S.shape[:-1])
    certificate = Certificate(
        error=zero,
        residual=zero,
        outside=S[..., r] if r < S.size(-1) else zero,
        energy=_share(S[..., :r], torch.linalg.vector_norm(S, dim=-1, dtype=torch.float64)),
        exact=torch.ones_like(zero, dtype=torch.bool),
        passed=torch.ones_like(zero, dtype=torch.bool),
    )
    return TopSVD(U[..., :r], S[..., :r], Vh[..., :r, :], certificate)


def _one(
    A: Tensor,
    r: int,
    method: SVDMethod,
    tol: float,
    oversampling: int | None,
    iterations: int,
    generator: torch.Generator | None,
) -> TopSVD:
    """Randomized triples of one matrix, or full ones for "auto" if they fail."""
    q = _block(r, oversampling, min(A.shape))
    found = _randomized(A, r, q, tol, iterations, generator, give_up=method == "auto")
    return found if method == "randomized" or bool(found.certificate.passed) else _full(A, r)


def _randomized(
    A: Tensor,
    r: int,
    q: int,
    tol: float,
    iterations: int,
    generator: torch.Generator | None,
    give_up: bool,
) -> TopSVD:
    """Subspace iteration until the certificate holds or, if `give_up`, is not going to in time."""
    generator = generator or torch.Generator().manual_seed(0)
    shape = (A.size(1), q + _PROBES)
    start = torch.randn(shape, generator=generator, device=generator.device, dtype=A.dtype).to(A.device)
    Y = A @ start
    errors: list[float] = []
    while True:
        # Probes ride along with the block: products of so few columns alone take as long as those of all.
        Q = torch.linalg.qr(Y[:, :q]).Q
        left_out = _outside(Q, Y[:, q:])
        left_out = left_out / torch.linalg.matrix_norm(left_out).clamp_min(torch.finfo(A.dtype).tiny)
        Y = A.mT @ torch.cat([Q, left_out], 1)
        V, R = torch.linalg.qr(Y[:, :q])
        Y = A @ torch.cat([V, torch.linalg.qr(Y[:, q:]).Q], 1)
        # W ≈ Q Rᵀ Vᵀ, so its triples are those of Rᵀ, turned.
        Z, S, Xh = torch.linalg.svd(R.mT)
        U, X = Q @ Z[:, :r], Xh[:r].mT
        residuals = torch.linalg.vector_norm(Y[:, :q] @ X - U * S[:r], dim=0, dtype=torch.float64)
        rest = torch.linalg.matrix_norm(_outside(Q, Y[:, q:]), 2)
        rest = torch.maximum(rest, S[-1]) if q < min(A.shape) else rest
        error = _error(S, r, residuals, rest, max(A.shape))
        errors.append(error)
        last = len(errors) == iterations
        if error <= tol or last or (give_up and _hopeless(errors, tol, iterations)):
            break
    certificate = Certificate(
        error=S.new_tensor(error),
        residual=(residuals.max() / S[0].clamp_min(torch.finfo(S.dtype).tiny)).to(S.dtype),
        outside=torch.maximum(S[r], rest) if r < q else rest,
        energy=_share(S[:r], torch.linalg.vector_norm(A, dtype=torch.float64)),
        exact=torch.zeros_like(S[0], dtype=torch.bool),
        passed=torch.full_like(S[0], error <= tol, dtype=torch.bool),
    )
    return TopSVD(U, S[:r], (V @ X).mT, certificate)


def _error(S: Tensor, r: int, residuals: Tensor, rest: Tensor, size: int) -> float:
    """Largest estimated relative error of the first r of S."""
    values, rest = S[:r].double(), rest.double()
    below = (values.square() + residuals.square() - rest.square()) / 2
    coupled = torch.hypot(below, residuals * rest)
    squared = (residuals.square() + rest.square() - values.square()) / 2 + coupled  # σ² − s²
    errors = (1 + (squared / values.square()).clamp_min(0)).sqrt() - 1
    # Values that are rounding errors of the largest are right as they are, if what was left out is no more.
    rounding = 4 * torch.finfo(S.dtype).eps * math.sqrt(size) * S[0].double()
    return float(errors.masked_fill((values <= rounding) & (rest <= rounding), 0.0).max())


def _outside(Q: Tensor, Y: Tensor) -> Tensor:
    """The part of Y outside the span of Q."""
    return Y - Q @ (Q.mT @ Y)


def _hopeless(errors: list[float], tol: float, iterations: int) -> bool:
    """Whether the error, going on as it does, stays above the tolerance."""
    if len(errors) < 4:
        return False
    now, before = errors[-1], errors[-2]
    return not now < before or now * (now / before) ** (iterations - len(errors)) > tol


def _share(S: Tensor, norm: Tensor) -> Tensor:
    """Σ S² / norm², which may be out of range for squares."""
    share = (S.double() / norm.clamp_min(torch.finfo(torch.float64).tiny).unsqueeze(-1)).square().sum(-1)
    return torch.where(norm > 0, share, 1.0).clamp_max(1.0).to(S.dtype)


def _signed(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Signs such that the largest entry of each left vector is positive."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * signs, Vh * signs.mT


def _stacked(found: list[TopSVD]) -> TopSVD:
    return TopSVD(
        torch.stack([one.U for one in found]),
        torch.stack([one.S for one in found]),
        torch.stack([one.Vh for one in found]),
        Certificate(*map(torch.stack, zip(*(one.certificate for one in found), strict=True))),
    )
