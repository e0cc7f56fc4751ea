"""Matrices of nearly equal shapes as one batch, by transposing and by columns of zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_shapes(shapes: Sequence[tuple[int, int]], waste: float = 0.125) -> list[list[int]]:
    """Sort shapes into groups that are worth one batch.

    Shapes of a group share the shorter side. Longer sides may differ, as long as padding them to the
    longest adds at most a share `waste` to the entries of the padded batch.

    Args:
        shapes: `(rows, columns)` of each matrix, in either order.
        waste: Largest share of padding, in [0, 1).

    Returns:
        Groups of indices into `shapes`; every index is in one of them. Groups and their members are in the order of
        longest sides, ascending, for each shorter side in the order of its first appearance.

    Raises:
        ValueError: If `waste` is out of range.

    Complexity:
        O(k log k) for k shapes. Greedy from the longest side down, which makes the fewest groups when all are
        equally large.

    Example:
        >>> merge_shapes([(64, 256), (64, 250), (256, 64), (64, 64), (32, 64)])
        [[3], [1, 0, 2], [4]]
    """
    if not 0 <= waste < 1:
        raise ValueError(f"waste must be in [0, 1), got {waste}")
    families: dict[int, list[int]] = {}
    for index, shape in enumerate(shapes):
        families.setdefault(min(shape), []).append(index)
    groups: list[list[int]] = []
    for members in families.values():
        members.sort(key=lambda i: max(shapes[i]))
        found: list[list[int]] = []
        entries = longest = 0
        for index in reversed(members):
            side = max(shapes[index])
            group = found[-1] if found else None
            if group is not None and entries + side >= (1 - waste) * longest * (len(group) + 1):
                group.append(index)
                entries += side
            else:
                found.append([index])
                entries = longest = side
        groups += [list(reversed(group)) for group in reversed(found)]
    return groups


def common_shape(shape: Sequence[int], parts: int = 8) -> tuple[int, int]:
    """The shape to pad a matrix to so that similar ones meet: short side first, the long one rounded up.

    Where `merge_shapes` looks at all shapes, this looks at one, as a rule must that is asked for the batch that a
    parameter belongs to. A padded side is at most `1/parts` longer.

    Args:
        shape: `(rows, columns)` in either order.
        parts: Steps to round to within a power of two. A power of two itself.

    Example:
        >>> common_shape((1000, 64)), common_shape((64, 1024)), common_shape((3, 5))
        ((64, 1024), (64, 1024), (3, 5))
    """
    short, long = sorted((shape[0], shape[1]))
    step = max(1, (1 << max(long - 1, 1).bit_length() - 1) // parts)
    return short, -(-long // step) * step


def stack_padded(matrices: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Stack matrices that share the shorter side, as rows ≤ columns, padded by zeros on the right.

    Zero columns leave the other singular values and the left singular vectors as they are, and come out as
    zeros of every function of singular values that maps 0 to 0.

    Args:
        matrices: Tensors of shape `(m, n)` or `(n, m)`, m ≤ n, of one dtype and device.
        width: Number of columns of the result. Default: the longest side.

    Returns:
        Shape `(len(matrices), m, width)`.

    Raises:
        ValueError: If there are none, a shorter side differs, or `width` is below a longer side.

    Example:
        >>> stack_padded([torch.ones(1, 2), torch.ones(3, 1)])
        tensor([[[1., 1., 0.]],
                [[1., 1., 1.]]])
    """
    if not matrices:
        raise ValueError("stack_padded needs at least one matrix, got none")
    shapes = [tuple(matrix.shape) for matrix in matrices]
    short, long = min(shapes[0]), max(max(shape) for shape in shapes)
    width = long if width is None else width
    if any(len(shape) != 2 or min(shape) != short for shape in shapes) or width < long:
        raise ValueError(
            f"stack_padded needs matrices that share the shorter side, none longer than width={width}; got {shapes}"
        )
    if len(set(shapes)) == 1 and shapes[0] == (short, width):
        return torch.stack(list(matrices))
    out = matrices[0].new_zeros(len(matrices), short, width)
    for row, matrix in zip(out, matrices, strict=True):
        wide = matrix.mT if matrix.size(0) > matrix.size(1) else matrix
        row[:, : wide.size(1)] = wide
    return out


def unstack_padded(stacked: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Undo `stack_padded`.

    Args:
        stacked: Shape `(k, m, width)`.
        shapes: The k shapes that were stacked.

    Returns:
        Views of `stacked` with those shapes.

    Example:
        >>> [tuple(x.shape) for x in unstack_padded(torch.zeros(2, 1, 3), [(1, 2), (3, 1)])]
        [(1, 2), (3, 1)]
    """
    parts = zip(stacked.unbind(), shapes, strict=True)
    return [x[:, : max(s)].mT if s[0] > s[1] else x[:, : max(s)] for x, s in parts]
