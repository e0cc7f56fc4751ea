"""Linear maps between two spaces of paired embeddings: least squares, rotations, and what lies between, in closed form.

All functions take batches of problems in leading dimensions, and know the data by their second moments only, so that
data may be summed up in pieces and cost nothing after that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from weightlab.linalg import orthogonality_deviation, polar_factor, relaxed_polar_factor


class PairMoments(NamedTuple):
    """Second moments of pairs (z, h), in float64, about the means or about zero.

    Attributes:
        zz: Mean of `z zᵀ`, `(..., d_z, d_z)`.
        hz: Mean of `h zᵀ`, `(..., d_h, d_z)`.
        hh: Mean of `h hᵀ`, `(..., d_h, d_h)`.
        z: What was subtracted from z, `(..., d_z)`: its mean, or zeros.
        h: What was subtracted from h.
    """

    zz: Tensor
    hz: Tensor
    hh: Tensor
    z: Tensor
    h: Tensor


def pair_moments(z: Tensor, h: Tensor, *, center: bool = False) -> PairMoments:
    """Sum up paired embeddings.

    Args:
        z: `(..., n, d_z)`, row i belonging to row i of h.
        h: `(..., n, d_h)`.
        center: Whether moments are about the means, as a map with a bias needs them. Default False.

    Complexity:
        `n·(d_z + d_h)²` flops.

    Example:
        >>> pair_moments(torch.eye(2), 2 * torch.eye(2)).hz
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    z, h = z.double(), h.double()
    mean_z, mean_h = (x.mean(-2) if center else torch.zeros_like(x[..., 0, :]) for x in (z, h))
    z, h = z - mean_z.unsqueeze(-2), h - mean_h.unsqueeze(-2)
    n = z.shape[-2]
    return PairMoments(z.mT @ z / n, h.mT @ z / n, h.mT @ h / n, mean_z, mean_h)


def bias_for(moments: PairMoments, W: Tensor) -> Tensor:
    """The bias that is best beside W, `mean h − W mean z`: zero for moments that are not centred."""
    return moments.h - (W @ moments.z.unsqueeze(-1)).squeeze(-1)


def pulled_forward(moments: PairMoments, weight: float) -> PairMoments:
    """Add to `‖Wz − h‖²` the part of Wz that no linear map of h could give, times `weight`.

    For the best F, `‖F h − Wz‖²` is a quadratic form of W alone, with which W is fitted as if both were.

    Complexity:
        Cubic in the dimensions.
    """
    explained = moments.hz.mT @ torch.linalg.pinv(moments.hh, hermitian=True) @ moments.hz
    return moments._replace(zz=moments.zz + weight * (moments.zz - explained))


def squared_error(moments: PairMoments, W: Tensor) -> Tensor:
    """Mean of `‖Wz − h‖²`, bias included where moments are centred."""
    quadratic = ((W @ moments.zz - 2 * moments.hz) * W).sum((-2, -1))
    return quadratic + moments.hh.diagonal(dim1=-2, dim2=-1).sum(-1)


def least_squares(moments: PairMoments) -> Tensor:
    """The W of least `‖Wz − h‖²`, and of least norm where several are: `(..., d_h, d_z)`."""
    return moments.hz @ torch.linalg.pinv(moments.zz, hermitian=True)


def procrustes(moments: PairMoments) -> Tensor:
    """The semi-orthogonal W whose Wz points along h as well as possible, `max E⟨Wz, h⟩`: `(..., d_h, d_z)`.

    With d_h ≥ d_z that is the least `‖Wz − h‖²`. With d_h < d_z it is so once h is padded by zeros and W is
    completed to a square rotation.
    """
    return polar_factor(moments.hz)


def within_tolerance(moments: PairMoments, tol: float, steps: int = 200) -> Tensor:
    r"""A W with `‖WᵀW − I‖_F ≤ tol` (of the short side) and small `‖Wz − h‖²`.

    Exactly `least_squares` where that is within the tolerance, and exactly `procrustes` for `tol=0`. Else descent on
    the boundary from `procrustes`: a step along the boundary in a metric that knows the spread of z and, by the constraint's
    multiplier, the boundary's curvature; then the rotation of Wz that suits h best. Steps that do not descend are
    shortened. It ends in a local minimum; the set is not convex. With d_h < d_z the same is done from `least_squares`
    brought within, and the better end is kept.

    Args:
        moments: Of the pairs.
        tol: λ, at least 0; infinity for no limit.
        steps: At most. Default 200; fewer where nothing is to be gained any more.

    Returns:
        `(..., d_h, d_z)`, float64.

    Complexity:
        Two singular value decompositions a step, of which some tens are made.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> W = within_tolerance(pair_moments(z, z * torch.tensor([2.0, 1.0])), tol=1.0)
        >>> (W * W).round(decimals=3) + 0.0
        tensor([[2., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    if tol == 0:
        return procrustes(moments)
    free = least_squares(moments)
    if math.isinf(tol):
        return free
    inside = (orthogonality_deviation(free) <= tol)[..., None, None]
    if bool(inside.all()):
        return free
    # Starts lie side by side as one more dimension of the batch. In a space no smaller, the rotation is near the best.
    W = procrustes(moments).unsqueeze(0)
    if W.size(-2) < W.size(-1):
        W = torch.cat([W, relaxed_polar_factor(free, tol).unsqueeze(0)])
    error = squared_error(moments, W)
    scale, done = torch.ones_like(error), torch.zeros_like(error, dtype=torch.bool)
    for _ in range(steps):
        direction, bound = _along_boundary(moments, W, tol)
        trial = _brought_back(W - scale[..., None, None] * direction, bound, tol)
        trial = polar_factor(moments.hz @ trial.mT) @ trial
        reached = squared_error(moments, trial)
        better = reached < error
        done |= better & (scale >= 0.3) & (error - reached <= 1e-7 * error)
        W = torch.where(better[..., None, None], trial, W)
        error = torch.where(better, reached, error)
        scale = torch.where(better, (1.5 * scale).clamp_max(4), scale / 3)
        done |= scale < 1e-6
        if bool(done.all()):
            break
    W = torch.where((error[-1] < error[0])[..., None, None], W[-1], W[0])
    return torch.where(inside, free, W)


def _along_boundary(moments: PairMoments, W: Tensor, tol: float) -> tuple[Tensor, Tensor]:
    """A direction to step against, along the boundary where it would leave else; and where that is."""
    gradient, gap = W @ moments.zz - moments.hz, _gap(W)
    normal = _times(gap, W)
    multiplier = -(gradient * normal).sum((-2, -1)) / normal.square().sum((-2, -1)).clamp_min(1e-300)
    at_boundary = torch.linalg.matrix_norm(gap) >= tol * (1 - 1e-6)
    multiplier = torch.where(at_boundary, multiplier.clamp_min(0), 0)
    diagonal = moments.zz.diagonal(dim1=-2, dim2=-1)
    ridge = (1e-9 * diagonal.mean(-1) + 2 * multiplier).clamp_min(1e-300)
    identity = torch.eye(W.size(-1), dtype=W.dtype, device=W.device)
    metric = torch.linalg.cholesky(moments.zz + ridge[..., None, None] * identity)
    direction, bent = _solve(metric, gradient), _solve(metric, normal)
    inward = (normal * direction).sum((-2, -1))
    bound = at_boundary & (inward < 0)
    share = torch.where(bound, inward / (normal * bent).sum((-2, -1)).clamp_min(1e-300), 0)
    return direction - share[..., None, None] * bent, bound


def _brought_back(W: Tensor, bound: Tensor, tol: float) -> Tensor:
    """Newton's method for D² = tol² along its gradient, where D is larger or W is to stay on the boundary.

    The rest is left to `relaxed_polar_factor`, which alone would move singular values near 0 by the root of the excess.
    """
    for _ in range(4):
        gap = _gap(W)
        normal = _times(gap, W)
        # A hair within, where `relaxed_polar_factor` has nothing left to do.
        excess = (gap.square().sum((-2, -1)) - tol**2 * (1 - 1e-10)) / 4
        excess = torch.where(bound, excess, excess.clamp_min(0))
        W = W - (excess / normal.square().sum((-2, -1)).clamp_min(1e-300))[..., None, None] * normal
    return relaxed_polar_factor(W, tol)


def _solve(metric: Tensor, gradient: Tensor) -> Tensor:
    return torch.cholesky_solve(gradient.mT, metric).mT


def _gap(W: Tensor) -> Tensor:
    """Gram matrix of the short side less the identity. `_times` W it is the gradient of D²/4."""
    gram = W.mT @ W if W.size(-2) > W.size(-1) else W @ W.mT
    return gram - torch.eye(gram.size(-1), dtype=W.dtype, device=W.device)


def _times(gap: Tensor, W: Tensor) -> Tensor:
    return W @ gap if W.size(-2) > W.size(-1) else gap @ W
