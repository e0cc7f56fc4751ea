"""The eigenvalue spectrum of a layer's correlation matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from weightlab.linalg.gram_spectrum import gram_eigenvalues

ConvView = Literal["slices", "flattened"]
Normalization = Literal["none", "1/N"]

# What the squared singular values of a kernel's slices are multiplied by.
SLICE_FACTOR = 0.5


def esd(
    weight: Tensor,
    *,
    conv: ConvView = "slices",
    normalize: Normalization = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Eigenvalues of a layer's correlation matrix: squared singular values of its weight, ascending.

    Args:
        weight: Shape `(out, in)`, or `(out, in, *kernel)` for a convolution; floating point.
        conv: How a kernel is made matrices. `"slices"` (default, as WeightWatcher 0.7.7 pools them): one `(out, in)`
            matrix a position of the kernel, each times √½, all spectra together. `"flattened"`: one matrix
            `(out, in · positions)`.
        normalize: `"none"` (default, as WeightWatcher does) or `"1/N"` (the paper): divide by the matrices' longer
            side. Exponents and counts do not depend on it; norms do.
        dtype: Type to compute in, float64 (default) or float32; see
            [`gram_eigenvalues`][weightlab.linalg.gram_eigenvalues] for what float32 loses.

    Returns:
        Shape `(n,)`: n the shorter side, times the positions of the kernel for `"slices"`.

    Raises:
        TypeError: If `weight` is not floating point.
        ValueError: If `weight` has fewer than two dimensions, is empty or on the meta device or holds NaN or
            infinity, or an option is unknown.

    Complexity:
        `2·m²·n + (4/3)·m³` flops a matrix, m the shorter side.

    References:
        SETOL: A Semi-Empirical Theory of (Deep) Learning, arXiv 2507.17912.

    Example:
        >>> esd(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]]))
        tensor([1., 4.], dtype=torch.float64)
        >>> esd(torch.ones(4, 2, 3, 3)).shape, esd(torch.ones(4, 2, 3, 3), conv="flattened").shape
        (torch.Size([18]), torch.Size([4]))
    """
    if conv not in ("slices", "flattened"):
        raise ValueError(f'conv must be "slices" or "flattened", got {conv!r}')
    if normalize not in ("none", "1/N"):
        raise ValueError(f'normalize must be "none" or "1/N", got {normalize!r}')
    if weight.ndim < 2:
        raise ValueError(f"esd needs a matrix or a kernel, got a weight of shape {tuple(weight.shape)}")
    sliced = weight.ndim > 2 and conv == "slices"
    matrices = weight.flatten(2).permute(2, 0, 1) if sliced else weight.flatten(1)
    eigenvalues = gram_eigenvalues(matrices, dtype).flatten().sort().values
    if sliced:
        eigenvalues *= SLICE_FACTOR
    return eigenvalues / max(matrices.shape[-2:]) if normalize == "1/N" else eigenvalues
