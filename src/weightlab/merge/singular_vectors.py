"""How far two networks' layers agree in their leading singular vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor

from weightlab.merge.weight_descent import check_same_tensors


class SingularAlignment(TypedDict):
    """Alignments: `total` over all layers, `per_layer` by name."""

    per_layer: dict[str, float]
    total: float


@torch.no_grad()
def singular_alignment(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], threshold: float = 0.3
) -> SingularAlignment:
    r"""Alignment of the singular vectors of two networks' layers, those with large singular values only.

    With :math:`I = \{i : s_i \ge \gamma s_1\}` for each layer of each network,

    .. math:: R_\gamma = \frac{\sum_\ell \sum_{i \in I_a, j \in I_b} (u_i^a \cdot u_j^b)(v_i^a \cdot v_j^b)}
        {\sum_\ell \max(|I_a|, |I_b|)} \le 1

    which is 1 where the leading parts agree. Neither signs nor the choice of vectors within equal singular values matter.

    Args:
        a: Tensors by name, such as a state dict. Floating tensors of two or more axes count, flattened to
            (first axis, rest).
        b: The other network, permuted or not: the same names and shapes.
        threshold: γ in [0, 1]. Default 0.3. At 0 all vectors count, save those of singular values that are 0 within
            rounding.

    Returns:
        ``{"per_layer": {name: R of this layer alone}, "total": R}``. Layers that are zero in either network are left out.

    Raises:
        ValueError: If names or shapes differ, `threshold` is outside [0, 1], an entry is not finite, or no layer is left.

    Complexity:
        A singular value decomposition of each layer in float64, and products of their vectors.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051. The paper
        leaves the threshold and the divisor open; these make a network's alignment with itself 1.

    Example:
        >>> w = {"w": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> singular_alignment(w, {"w": torch.tensor([[3.0, 0.0], [0.0, -1.0]])}, threshold=0)
        {'per_layer': {'w': 0.0}, 'total': 0.0}
        >>> singular_alignment(w, {"w": torch.tensor([[3.0, 0.0], [0.0, -1.0]])}, threshold=0.5)["total"]
        1.0
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    check_same_tensors(a, b)
    numerator = 0.0
    denominator = 0
    per_layer: dict[str, float] = {}
    for name, x in a.items():
        if x.ndim < 2 or not x.is_floating_point():
            continue
        left, right = _leading(name, x, threshold), _leading(name, b[name], threshold)
        if left is None or right is None:
            continue
        (ua, va), (ub, vb) = left, right
        ub, vb = ub.to(ua.device), vb.to(va.device)
        shared = float(((ua.T @ ub) * (va @ vb.T)).sum())
        count = max(len(va), len(vb))
        per_layer[name] = shared / count
        numerator, denominator = numerator + shared, denominator + count
    if not denominator:
        raise ValueError("no layer to compare: no tensor of two or more axes is nonzero in both networks")
    return {"per_layer": per_layer, "total": numerator / denominator}


def _leading(name: str, tensor: Tensor, threshold: float) -> tuple[Tensor, Tensor] | None:
    matrix = tensor.flatten(1).double()
    if not matrix.isfinite().all():
        raise ValueError(f"{name} has entries that are not finite")
    if not matrix.any():
        return None
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rounding = torch.finfo(tensor.dtype).eps * max(matrix.shape) if threshold == 0 else 0.0
    # One unit of rounding keeps a value that is equal to the bound, as the largest is at 1.
    keep = s >= s[0] * max(threshold * (1 - 1e-12), rounding)
    return u[:, keep], vh[keep]
