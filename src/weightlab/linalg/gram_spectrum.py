"""Eigenvalues of Gram matrices: the squared singular values, from products of the short side."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import eigvalsh, get_blas_funcs
from torch import Tensor

# Entries of W converted at a time, so that no second copy of a large matrix exists.
_CHUNK = 1 << 22
# Rows of a batch of Gram matrices computed at a time, from the left end to the diagonal.
_STRIP = 256
# Matrices with a shorter side from this on are done one by one on the CPU.
_ALONE = 192
# Where PyTorch's solver is faster than SciPy's, and the copy that it makes of the Gram matrix small.
_COPIED = range(1536, 8193)


@torch.no_grad()
def gram_eigenvalues(W: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    r"""Eigenvalues of :math:`W W^\top`, or of :math:`W^\top W` where that is smaller: squared singular values.

    The Gram matrix is summed over chunks of the long side, each converted to `dtype` by itself. Beside W, memory
    holds the Gram matrix, for m up to 8192 a copy of it, and one chunk.

    Args:
        W: Shape `(..., m, n)`, floating point, any strides. The leading dimensions are a batch.
        dtype: Type to compute in, float64 (default) or float32. Squaring halves the digits: eigenvalues are right
            to about `eps · λ_max`, so that in float32 those under about `1e-6 · λ_max` are rounding errors,
            and with them ranks, entropies and sums of logarithms over the whole spectrum.

    Returns:
        Shape `(..., min(m, n))`, type `dtype`, ascending, not below 0.

    Raises:
        TypeError: If W or `dtype` is not of such a type.
        ValueError: If W is no matrix, on the meta device, empty, or holds NaN or infinity (or entries whose
            squares are out of the range of `dtype`).

    Complexity:
        `m²·n + (4/3)·m³` flops a matrix, for m ≤ n; up to twice the first on other devices and for m under 192.

    Example:
        >>> gram_eigenvalues(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, -2.0]]))
        tensor([4., 9.], dtype=torch.float64)
    """
    if not W.is_floating_point():
        raise TypeError(f"gram_eigenvalues needs a real floating-point tensor, got {W.dtype}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
    if W.ndim < 2:
        raise ValueError(f"gram_eigenvalues needs matrices of shape (..., m, n), got {tuple(W.shape)}")
    if W.numel() == 0:
        raise ValueError(f"gram_eigenvalues needs at least one entry, got shape {tuple(W.shape)}")
    if W.is_meta:
        raise ValueError("gram_eigenvalues needs values, but W is on the meta device; load the weights first")
    if W.size(-2) > W.size(-1):
        W = W.mT
    batch, (m, n) = W.shape[:-2], W.shape[-2:]
    matrices = W.reshape(-1, m, n)
    if W.device.type == "cpu" and m >= _ALONE:
        values = torch.stack([_spectrum(matrix, dtype) for matrix in matrices])
    else:
        values = _batched_spectra(matrices, dtype)
    return values.clamp_min_(0).reshape(*batch, m)


def _spectrum(W: Tensor, dtype: torch.dtype) -> Tensor:
    """By half of the product and in place, which PyTorch has no functions for."""
    m = len(W)
    gram = np.zeros((m, m), torch.empty(0, dtype=dtype).numpy().dtype, order="F")
    (syrk,) = get_blas_funcs(("syrk",), (gram,))
    for chunk in W.split(max(1, _CHUNK // m), dim=1):
        # BLAS wants columns one after the other: the transpose of what PyTorch has.
        by_rows = chunk.stride(0) != 1
        a = (chunk if by_rows else chunk.mT).to(dtype).contiguous().numpy().T
        gram = syrk(1.0, a, beta=1.0, c=gram, trans=by_rows, lower=True, overwrite_c=True)
    # |gᵢⱼ|² is at most gᵢᵢ gⱼⱼ.
    _check(torch.from_numpy(gram.diagonal().copy()), dtype)
    if m in _COPIED:
        return torch.linalg.eigvalsh(torch.from_numpy(gram.T), UPLO="U")
    return torch.from_numpy(eigvalsh(gram, lower=True, overwrite_a=True, check_finite=False, driver="ev"))


def _batched_spectra(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    count, m, _ = matrices.shape
    gram = matrices.new_zeros(count, m, m, dtype=dtype)
    for chunk in matrices.split(max(1, _CHUNK // (count * m)), dim=-1):
        converted = chunk.to(dtype)
        # The eigensolver reads the lower triangle only.
        for start in range(0, m, _STRIP):
            rows = slice(start, start + _STRIP)
            gram[:, rows, : rows.stop].baddbmm_(converted[:, rows], converted[:, : rows.stop].mT)
    _check(gram.diagonal(dim1=-2, dim2=-1), dtype)
    return torch.linalg.eigvalsh(gram, UPLO="L")


def _check(diagonal: Tensor, dtype: torch.dtype) -> None:
    if not bool(diagonal.isfinite().all()):
        raise ValueError(
            f"W holds NaN or infinity, or entries whose squares overflow {dtype}, and has no spectrum; "
            "look for a broken checkpoint"
        )
