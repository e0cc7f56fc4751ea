"""The orthonormal discrete cosine transform, by matrix product or by real FFT."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Transform = Literal["auto", "matmul", "fft"]

# Below, a product with the n×n matrix is faster than an FFT and what goes with it (on a CPU, measured).
_FFT_FROM = 192


def dct_matrix(n: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
    r"""Return the orthonormal DCT-II matrix C of size n.

    .. math::
        C_{ij} = \sqrt{2/n} \cos\frac{\pi i (2j + 1)}{2n}, \quad \text{row 0 divided by } \sqrt 2

    Row i is the cosine of frequency i. ``x @ C.T`` is the DCT-II of the rows of x, ``x @ C`` their
    DCT-III, its inverse.

    Args:
        n: Size, at least 0.
        dtype: Floating type. Default: PyTorch's. Entries are computed in float64 and rounded once.
        device: Where the matrix goes.

    Returns:
        A new tensor of shape `(n, n)`.

    Raises:
        ValueError: If `n` is negative.

    Example:
        >>> dct_matrix(2, dtype=torch.float64)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]], dtype=torch.float64)
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    return cached_dct_matrix(n, dtype or torch.get_default_dtype(), torch.device(device)).clone()


@lru_cache(maxsize=16)
def cached_dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `dct_matrix`, one tensor for all callers: not to be written to."""
    with torch.inference_mode(False):
        frequencies = torch.arange(n)
        odd = 2 * torch.arange(n) + 1
        # The angle in whole units of π/2n, reduced: the argument of the cosine stays small and exact.
        units = (frequencies[:, None] * odd).remainder_(4 * n) if n else torch.empty(0, 0)
        matrix = torch.cos(units.double() * (math.pi / max(2 * n, 1))) * math.sqrt(2 / max(n, 1))
        matrix[:1] *= math.sqrt(0.5)
        return matrix.to(device=device, dtype=dtype)


class _Tables(NamedTuple):
    """What Makhoul's algorithm needs for one size.

    Attributes:
        order: Even positions upwards, then odd ones downwards.
        inverse: The inverse permutation.
        twiddles: `exp(−iπk/2n)·√(2/n)` for k ≤ n/2, and √(1/n) for k = 0.
    """

    order: Tensor
    inverse: Tensor
    twiddles: Tensor


@lru_cache(maxsize=64)
def _tables(n: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
        angles = torch.arange(n // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * n))
        twiddles = torch.polar(torch.full_like(angles, math.sqrt(2 / n)), angles)
        twiddles[0] *= math.sqrt(0.5)
        return _Tables(
            order.to(device),
            torch.argsort(order).to(device),
            twiddles.to(device=device, dtype=dtype.to_complex()),
        )


@lru_cache(maxsize=64)
def paired_places(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where `paired_dct` has each coefficient, and the sign that it has there.

    Returns:
        Shape `(n,)` each: int64 places in the last dimension, and signs ±1 in `dtype`.
    """
    with torch.inference_mode(False):
        frequencies = torch.arange(n)
        in_real_part = frequencies <= n // 2
        places = torch.where(in_real_part, 2 * frequencies, 2 * (n - frequencies) + 1)
        signs = torch.where(in_real_part, 1.0, -1.0)
        return places.to(device), signs.to(device=device, dtype=dtype)


def paired_dct(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """DCT-II along the last dimension, coefficients left in the order in which the FFT gives them.

    Coefficients k and n − k are the real and the negative imaginary part of entry k of one complex
    vector; `paired_places` tells where each is. Two entries are of no use. That saves a pass over the
    data for whoever needs a few coefficients, or the norm of each over many rows.

    Args:
        x: Shape `(..., n)`, n ≥ 1, float32 or float64.
        out: Contiguous tensor to write the result to.

    Returns:
        Shape `(..., 2·(n // 2 + 1))`.
    """
    tables = _tables(x.shape[-1], x.dtype, x.device)
    permuted = _permuted(x, tables.order)
    if out is None:
        return torch.view_as_real(torch.fft.rfft(permuted) * tables.twiddles).flatten(-2)
    spectrum = torch.view_as_complex(out.unflatten(-1, (-1, 2)))
    torch.fft.rfft(permuted, out=spectrum)
    spectrum.mul_(tables.twiddles)
    return out


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    # Rows of a transposed matrix are gathered far faster than its columns.
    if x.ndim > 1 and x.stride(-2) == 1 and x.stride(-1) != 1:
        return x.mT.index_select(-2, order).mT
    return x.index_select(-1, order)


def _dct2_by_fft(x: Tensor) -> Tensor:
    n = x.shape[-1]
    pairs = paired_dct(x).unflatten(-1, (-1, 2))
    return torch.cat([pairs[..., 0], -pairs[..., 1 : (n + 1) // 2, 1].flip(-1)], -1)


def _dct3_by_fft(x: Tensor) -> Tensor:
    n = x.shape[-1]
    tables = _tables(n, x.dtype, x.device)
    real = x[..., : n // 2 + 1]
    imaginary = torch.cat([torch.zeros_like(x[..., :1]), x[..., (n + 1) // 2 :].flip(-1)], -1)[
        ..., : n // 2 + 1
    ]
    spectrum = torch.complex(real, -imaginary) / tables.twiddles
    return torch.fft.irfft(spectrum, n=n).index_select(-1, tables.inverse)


def uses_fft(n: int, transform: Transform) -> bool:
    """Whether `dct` takes the FFT for vectors of n entries.

    Raises:
        ValueError: If `transform` is unknown.
    """
    if transform not in ("auto", "matmul", "fft"):
        raise ValueError(f'transform must be "auto", "matmul" or "fft", got {transform!r}')
    return transform == "fft" or (transform == "auto" and n >= _FFT_FROM)


def dct(x: Tensor, type: Literal[2, 3] = 2, *, dim: int = -1, transform: Transform = "auto") -> Tensor:
    """Orthonormal discrete cosine transform along one dimension; differentiable.

    Equals `scipy.fft.dct(x, type, norm="ortho")`. Type 3 is the inverse, and the transpose, of type 2. See
    `dct_matrix` for the formula.

    Args:
        x: Real floating point. Half precisions are transformed in float32 and rounded once.
        type: 2 or 3.
        dim: Dimension to transform. Default: the last.
        transform: `"matmul"` multiplies by `dct_matrix`; `"fft"` takes one real FFT of the same length
            (Makhoul's algorithm, half the work of the complex one); `"auto"` chooses by size.

    Returns:
        A new tensor with the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is complex or integer.
        ValueError: If type or transform is unknown, or `x` has no dimension.

    Complexity:
        For vectors of n entries: 2n² flops each by product, about 2.5·n·log₂(n) by FFT. Tables are kept
        for each size, dtype and device that was used last.

    References:
        J. Makhoul, "A fast cosine transform in one and two dimensions" (1980).

    Example:
        >>> dct(torch.ones(4)) + 0.0
        tensor([2., 0., 0., 0.])
        >>> x = torch.randn(3, 500, dtype=torch.float64)
        >>> torch.allclose(dct(dct(x), 3), x)
        True
    """
    if not x.is_floating_point():
        raise TypeError(f"dct needs a real floating-point tensor, got {x.dtype}")
    if type not in (2, 3):
        raise ValueError(f"type must be 2 or 3, got {type!r}")
    if x.ndim == 0:
        raise ValueError("dct needs at least one dimension, got a 0-dim tensor")
    n = x.shape[dim]
    by_fft = uses_fft(n, transform)
    if x.numel() == 0:
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(dim, -1)
    if by_fft:
        result = _dct2_by_fft(wide) if type == 2 else _dct3_by_fft(wide)
    else:
        matrix = cached_dct_matrix(n, wide.dtype, wide.device)
        result = wide @ (matrix.mT if type == 2 else matrix)
    return result.movedim(-1, dim).to(x.dtype)
