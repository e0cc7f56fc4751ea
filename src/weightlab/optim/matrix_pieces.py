"""Parameters that hold several matrices: the views of them that a matrix rule sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor


class SplitOptions(TypedDict, total=False):
    """How one parameter is cut into several matrices: `parts` or `sizes`.

    Attributes:
        parts: Number of equal parts, e.g. 3 for fused Q, K and V, or 3·heads for one matrix a head.
        sizes: Sizes of the parts, e.g. those of Q, K and V where K and V have fewer heads.
        dim: Dimension of the matrix to cut: 0 (rows, the outputs of `nn.Linear`; default) or 1 (columns).
    """

    parts: int
    sizes: Sequence[int]
    dim: int


Split = Sequence[int] | SplitOptions


def piece_sizes(
    shape: Sequence[int], split: Split | None, stacked: bool = False
) -> tuple[tuple[int, ...], int]:
    """Sizes of the parts of one matrix, and the dimension of it that is cut.

    Args:
        shape: The parameter's shape.
        split: Sizes of blocks of rows, or `SplitOptions`; `None` cuts nothing.
        stacked: Whether all but the last two dimensions count matrices, rather than belong to one.

    Raises:
        TypeError: If `split` is neither.
        ValueError: If a parameter of that shape cannot be split so; the message names the shape.

    Example:
        >>> piece_sizes((8, 5), (4, 2, 2)), piece_sizes((10, 8, 6), {"parts": 2, "dim": 1}, stacked=True)
        (((4, 2, 2), 0), ((3, 3), 1))
    """
    matrix = tuple(shape[-2:] if stacked else shape)
    if split is None:
        return (matrix[0] if matrix else 1,), 0
    options: dict[str, Any]
    if isinstance(split, Mapping):
        options = dict(split)
    elif isinstance(split, Sequence) and not isinstance(split, str):
        options = {"sizes": split}
    else:
        raise TypeError(
            f'split must be sizes of blocks of rows or {{"parts": n}}, got {type(split).__name__} {split!r}'
        )
    unknown = sorted(set(options) - {"parts", "sizes", "dim"})
    if unknown or ("parts" in options) is ("sizes" in options):
        raise ValueError(f'split must hold either "parts" or "sizes", and "dim" if not 0, got {split!r}')
    dim = options.get("dim", 0)
    if dim not in (0, 1):
        raise ValueError(f"split dim must be 0 (rows) or 1 (columns), got {dim!r}")
    if len(matrix) < 2:
        raise ValueError(
            f"split={split!r} needs matrices, got a parameter of shape {tuple(shape)}; "
            "give it a group of its own without split"
        )
    length = matrix[dim]
    if "parts" in options:
        parts = options["parts"]
        if not isinstance(parts, int) or parts < 1 or length % parts:
            raise ValueError(
                f"split into {parts!r} equal parts does not fit dimension {dim}, of size {length}, of a "
                f"matrix of shape {matrix} (parameter of shape {tuple(shape)}); give sizes instead"
            )
        return (length // parts,) * parts, dim
    sizes = tuple(options["sizes"])
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes) or sum(sizes) != length:
        raise ValueError(
            f"split sizes {sizes} must be positive and sum to {length}, the size of dimension {dim} of a "
            f"matrix of shape {matrix} (parameter of shape {tuple(shape)})"
        )
    return sizes, dim


def pieces(tensor: Tensor, split: Split | None, stacked: bool = False) -> list[Tensor]:
    """Views of a parameter, one for each matrix in it, in order.

    Args:
        tensor: The parameter, or a tensor of its shape.
        split: As in `piece_sizes`.
        stacked: As there.

    Returns:
        Views; writing to them writes to `tensor`.

    Example:
        >>> import torch
        >>> [tuple(piece.shape) for piece in pieces(torch.zeros(2, 6, 5), (4, 2), stacked=True)]
        [(4, 5), (2, 5), (4, 5), (2, 5)]
    """
    matrices = [tensor]
    while stacked and matrices and matrices[0].ndim > 2:
        matrices = [matrix for stack in matrices for matrix in stack.unbind(0)]
    if split is None:
        return matrices
    sizes, dim = piece_sizes(tensor.shape, split, stacked)
    return [piece for matrix in matrices for piece in matrix.split(sizes, dim)]
