"""Choosing those vectors of a fixed orthogonal basis that hold most of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from weightlab.linalg.cosine_transform import (
    Transform,
    cached_dct_matrix,
    dct,
    paired_dct,
    paired_places,
    uses_fft,
)

Basis = Literal["dct2", "dct3", "random", "identity"]
Norm = Literal[1, 2]

# From this size on the cosines of the chosen vectors are computed, and no n×n matrix is kept.
_TOO_LARGE_TO_KEEP = 4096
# Entries transformed at a time on a CPU: what is made of them is still in the cache when it is needed.
_CACHEFUL = 2**17


def select_basis_columns(
    G: Tensor,
    rank: int | float,
    *,
    basis: Basis = "dct2",
    norm: Norm = 1,
    transform: Transform = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Project matrices onto the r vectors of an orthogonal basis with which they are best aligned.

    The shorter side, of size n, is transformed. For m×n matrices with m ≥ n, with the basis in the
    columns of Q,

    .. math::
        S = G Q, \quad I = \text{the } r \text{ largest of } \lVert S_{:,j} \rVert_p, \quad \text{low} = S_{:,I}

    and the projection of G is :math:`\hat G = \text{low}\, Q_{:,I}^\top`. Wide matrices are treated as their
    transposes are. For p = 2 no other r columns leave a smaller error, and it is at most
    :math:`\lVert G - \hat G \rVert_F^2 \le (1 - r/n) \lVert G \rVert_F^2`, for any orthogonal Q.

    Args:
        G: Shape `(..., m, n)`, floating point. Leading dimensions are a batch, each matrix with
            columns of its own.
        rank: Number of vectors, at least 1, or a fraction of the shorter side in (0, 1]; at most n are
            taken.
        basis: `"dct2"` or `"dct3"`: rows or columns of `dct_matrix`; `"random"`: a rotation drawn once
            for each size, the same at every call; `"identity"`: coordinates.
        norm: p, 1 (default, as in the official code) or 2. Equal norms: the lower index wins.
        transform: How cosines are applied; see `dct`.

    Returns:
        `(low, indices)`. `low` has shape `(..., m, r)`, or `(..., r, n)` for m < n, in the dtype of G (float32
        for half precision). `indices`, int64 of shape `(..., r)`, go upwards. `expand_basis_columns` makes
        the projection of them.

    Raises:
        TypeError: If `G` is not floating point or `rank` not a number.
        ValueError: If G has fewer than two dimensions or an empty one, or an option is unknown or out of range.

    Complexity:
        About 2.5·m·n·log₂(n) flops by FFT, 2·m·n² otherwise; none for the identity. Independent of r.

    References:
        SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models, arXiv 2505.17967.

    Example:
        >>> G = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0]))
        >>> low, indices = select_basis_columns(G, rank=1)
        >>> indices, torch.allclose(expand_basis_columns(low, indices, G.shape), G)
        (tensor([1]), True)
    """
    if not G.is_floating_point():
        raise TypeError(f"select_basis_columns needs a real floating-point tensor, got {G.dtype}")
    if G.ndim < 2 or 0 in G.shape:
        raise ValueError(
            f"select_basis_columns needs non-empty matrices of shape (..., m, n), got {tuple(G.shape)}"
        )
    check_basis(basis)
    check_norm(norm)
    low, indices = select_tall(_tall(G), rank, basis, norm, transform)
    return (low if G.shape[-2] >= G.shape[-1] else low.mT), indices


def expand_basis_columns(
    low: Tensor, indices: Tensor, shape: torch.Size | tuple[int, ...], *, basis: Basis = "dct2"
) -> Tensor:
    """Turn what `select_basis_columns` gave back into matrices of full size.

    Args:
        low: As returned.
        indices: As returned.
        shape: Shape of the matrices; its last two entries count.
        basis: As given.

    Returns:
        Shape `(..., m, n)`.

    Complexity:
        2·m·n·r flops a matrix.

    Example:
        >>> expand_basis_columns(torch.ones(2, 1), torch.tensor([0]), (2, 2), basis="identity")
        tensor([[1., 0.],
                [1., 0.]])
    """
    check_basis(basis)
    rows, columns = shape[-2:]
    if rows >= columns:
        return low @ basis_vectors(indices, columns, basis, low.dtype)
    return basis_vectors(indices, rows, basis, low.dtype).mT @ low


def select_tall(
    X: Tensor, rank: int | float, basis: Basis, norm: Norm, transform: Transform = "auto"
) -> tuple[Tensor, Tensor]:
    """As `select_basis_columns` for matrices with m ≥ n, without its checks."""
    wide = X.to(torch.promote_types(X.dtype, torch.float32))
    n = wide.shape[-1]
    coefficients = _coefficients(wide, basis, norm, transform)
    # A stable sort, unlike topk, keeps ties in order.
    order = coefficients.scores.sort(dim=-1, descending=True, stable=True).indices
    indices = order[..., : resolve_rank(rank, n)].sort(dim=-1).values
    if coefficients.places is None or coefficients.signs is None:
        return _take_columns(coefficients.values, indices), indices
    low = _take_columns(coefficients.values, coefficients.places[indices])
    return low.mul_(coefficients.signs[indices].unsqueeze(-2)), indices


def project_tall(X: Tensor, vectors: Tensor) -> Tensor:
    """Coefficients `(..., m, r)` of matrices `(..., m, n)` for given basis vectors `(..., r, n)`."""
    return X.to(vectors.dtype) @ vectors.mT


def basis_vectors(indices: Tensor, n: int, basis: Basis, dtype: torch.dtype) -> Tensor:
    """Return chosen vectors of a basis of size n as rows: indices `(..., r)` -> `(..., r, n)`."""
    if n >= _TOO_LARGE_TO_KEEP and basis in ("dct2", "dct3"):
        return _computed_cosines(indices, n, basis, dtype)
    return _cached_vectors(n, basis, dtype, indices.device)[indices]


def carry_columns(moments: Sequence[Tensor], previous: Tensor, current: Tensor) -> list[Tensor]:
    r"""Move columns that belong to basis vectors to where these are now.

    Equals :math:`M\, Q_{:,\text{previous}}^\top Q_{:,\text{current}}` for each M, since the product of
    columns of one orthogonal matrix is a partial permutation: vectors that stay keep their column, new
    ones start from zero, dropped ones are lost.

    Args:
        moments: Shape `(..., m, r)` each.
        previous: Indices of the columns, int64 `(..., r)`, ascending.
        current: Indices that are wanted, int64 `(..., s)`.

    Returns:
        Shape `(..., m, s)` each.

    Example:
        >>> carry_columns([torch.tensor([[1.0, 2.0]])], torch.tensor([3, 5]), torch.tensor([1, 5]))
        [tensor([[0., 2.]])]
    """
    count = previous.shape[-1]
    slots = torch.searchsorted(previous, current).clamp_(max=count - 1)
    # New vectors take a column of zeros, one past the last: NaN in a dropped column stays behind.
    slots = torch.where(previous.gather(-1, slots) == current, slots, count)
    return [_take_columns(torch.nn.functional.pad(M, (0, 1)), slots) for M in moments]


def resolve_rank(rank: int | float, n: int) -> int:
    """Return the number of vectors: a fraction of n rounded, then at least 1 and at most n.

    Example:
        >>> resolve_rank(128, 64), resolve_rank(0.25, 64), resolve_rank(0.001, 64)
        (64, 16, 1)
    """
    check_rank(rank)
    return min(n, max(1, round(rank * n)) if isinstance(rank, float) else rank)


def check_rank(rank: int | float) -> None:
    """Raise unless `rank` is a positive whole number or a fraction in (0, 1]."""
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise TypeError(f"rank must be a whole number or a fraction in (0, 1], got {rank!r}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(
            f"rank as a fraction must be in (0, 1], got {rank}; give an int for a number of vectors"
        )
    if rank <= 0:
        raise ValueError(f"rank must be at least 1, got {rank}")


def check_basis(basis: str) -> None:
    """Raise ValueError unless `basis` is known."""
    if basis not in get_args(Basis):
        raise ValueError(f"basis must be one of {', '.join(get_args(Basis))}, got {basis!r}")


def check_norm(norm: int) -> None:
    """Raise ValueError unless `norm` is 1 or 2."""
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm!r}")


class _Coefficients(NamedTuple):
    """Coefficients of all basis vectors, in an order of their own, and a score for each vector.

    Attributes:
        values: Shape `(..., m, k)`.
        scores: Shape `(..., n)`.
        places: Column of each vector, `(n,)`; `None` where they are in order.
        signs: Factor for each vector, `(n,)`; `None` for one.
    """

    values: Tensor
    scores: Tensor
    places: Tensor | None = None
    signs: Tensor | None = None


def _coefficients(X: Tensor, basis: Basis, norm: Norm, transform: Transform) -> _Coefficients:
    n = X.shape[-1]
    by_fft = uses_fft(n, transform)
    if basis == "dct2" and by_fft:
        places, signs = paired_places(n, X.dtype, X.device)
        if X.ndim == 2 and X.device.type == "cpu" and not torch.is_grad_enabled():
            values = X.new_empty(X.shape[0], 2 * (n // 2 + 1))
            sums = X.new_zeros(values.shape[-1])
            count = max(1, _CACHEFUL // n)
            for rows, out in zip(X.split(count), values.split(count), strict=True):
                sums += _score(paired_dct(rows, out=out), norm)
        else:
            values = paired_dct(X)
            sums = _score(values, norm)
        return _Coefficients(values, sums[..., places], places, signs)
    if basis == "identity":
        values = X
    elif basis == "dct3" and by_fft:
        values = dct(X, 3, transform="fft")
    else:
        values = X @ _cached_vectors(n, basis, X.dtype, X.device).mT
    return _Coefficients(values, _score(values, norm))


def _score(values: Tensor, norm: Norm) -> Tensor:
    """The p-th power of the norm of each column; the root would not change their order."""
    return (values.abs() if norm == 1 else values.square()).sum(-2)


def _take_columns(matrices: Tensor, columns: Tensor) -> Tensor:
    """Columns `(..., r)` of matrices `(..., m, n)`, each with its own."""
    if columns.ndim == 1:
        return matrices.index_select(-1, columns)
    return matrices.gather(-1, columns.unsqueeze(-2).expand(*matrices.shape[:-1], columns.shape[-1]))


def _tall(G: Tensor) -> Tensor:
    return G if G.shape[-2] >= G.shape[-1] else G.mT


@lru_cache(maxsize=32)
def _cached_vectors(n: int, basis: Basis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All vectors of a basis as rows, contiguous; one tensor for all callers, not to be written to."""
    if basis == "dct2":
        return cached_dct_matrix(n, dtype, device)
    with torch.inference_mode(False):
        if basis == "dct3":
            return cached_dct_matrix(n, dtype, device).mT.contiguous()
        if basis == "identity":
            return torch.eye(n, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(n)
        Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
        # Without the signs of R's diagonal, Q would not be distributed uniformly over rotations.
        return (Q * R.diagonal().sign()).mT.contiguous().to(device=device, dtype=dtype)


def _computed_cosines(indices: Tensor, n: int, basis: Basis, dtype: torch.dtype) -> Tensor:
    table, scale = _cosine_table(n, dtype, indices.device)
    positions = torch.arange(n, device=indices.device)
    if basis == "dct2":
        units = indices.unsqueeze(-1) * (2 * positions + 1)
        return table[units.remainder_(4 * n)] * scale[indices].unsqueeze(-1)
    units = (2 * indices + 1).unsqueeze(-1) * positions
    return table[units.remainder_(4 * n)] * scale


@lru_cache(maxsize=16)
def _cosine_table(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """`cos(πu/2n)` for u < 4n, and the factor of each frequency."""
    with torch.inference_mode(False):
        table = torch.cos(torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n)))
        scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
        scale[0] *= math.sqrt(0.5)
        return table.to(device=device, dtype=dtype), scale.to(device=device, dtype=dtype)
