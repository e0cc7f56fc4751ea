"""Computing a gallery anew bit by bit: in which order, and what that gains on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weightlab.merge.retrieval import check_embeddings, check_labels, retrieval_report


@torch.no_grad()
def backfill_order(lifted: Tensor, labels: Tensor, *, hardest_first: bool = True) -> Tensor:
    """Order in which to compute gallery items anew: those first that lie farthest from their class by what is there now.

    Args:
        lifted: `(n, d)`, the old gallery as it is searched until then, that is after `CompatibilityAdapter.lift`.
        labels: `(n,)`, classes.
        hardest_first: Default True; False for the reverse, as a control.

    Returns:
        Indices, `(n,)` int64, by cosine to the mean direction of the class. Ties keep the gallery's order.

    Raises:
        TypeError: As `retrieval_report`.
        ValueError: As `retrieval_report`.

    Reference:
        "λ-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664, orders a partial backfill;
        that it does so by this distance is inferred.

    Example:
        >>> backfill_order(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([5, 5, 5]))
        tensor([2, 0, 1])
    """
    lifted = F.normalize(check_embeddings(lifted, "lifted"), dim=1)
    classes, index = check_labels(labels, len(lifted), "labels").to(lifted.device).unique(return_inverse=True)
    sums = lifted.new_zeros(len(classes), lifted.size(1)).index_add_(0, index, lifted)
    closeness = (lifted * F.normalize(sums, dim=1)[index]).sum(1)
    return closeness.argsort(descending=not hardest_first, stable=True)


@dataclass(frozen=True)
class BackfillCurve:
    """What queries find while a gallery is computed anew.

    Attributes:
        fractions: Shares of the gallery computed anew, ascending.
        top1: Share of queries whose most similar item is of their class, for each.
        mean_ap: Mean average precision, for each.
        area: Area under `top1` over the fractions, divided by their range.
        area_ap: The same of `mean_ap`.
    """

    fractions: tuple[float, ...]
    top1: tuple[float, ...]
    mean_ap: tuple[float, ...]
    area: float
    area_ap: float


def backfill_curve(
    query: Tensor,
    lifted: Tensor,
    recomputed: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    order: Tensor,
    *,
    fractions: int | Sequence[float] = 11,
    exclude_self: bool = False,
) -> BackfillCurve:
    """Search a gallery of which ever more items are replaced by their new embeddings.

    Args:
        query: `(q, d)`, new embeddings mapped by `CompatibilityAdapter.to_old`.
        lifted: `(n, d)`, the old gallery: `CompatibilityAdapter.lift` of it.
        recomputed: `(n, d)`, the gallery by the new model, mapped like the queries.
        query_labels: `(q,)`.
        gallery_labels: `(n,)`.
        order: Indices of the gallery in the order of replacement, such as `backfill_order` gives.
        fractions: How many points, evenly spaced from 0 to 1, or which. Default 11.
        exclude_self: As in `retrieval_report`.

    Raises:
        TypeError: As `retrieval_report`.
        ValueError: As `retrieval_report`, or if `order` is no permutation, or fractions lie outside [0, 1].

    Complexity:
        One `retrieval_report` a point.

    Example:
        >>> x = torch.eye(3)
        >>> curve = backfill_curve(x, x.roll(1, 0), x, torch.arange(3), torch.arange(3), torch.arange(3), fractions=4)
        >>> [round(y, 2) for y in curve.top1], round(curve.area, 2)
        ([0.0, 0.0, 0.33, 1.0], 0.28)
    """
    lifted, recomputed = check_embeddings(lifted, "lifted"), check_embeddings(recomputed, "recomputed")
    if lifted.shape != recomputed.shape:
        raise ValueError(
            f"lifted and recomputed must be one gallery, got shapes {tuple(lifted.shape)} and {tuple(recomputed.shape)}"
        )
    if not torch.equal(order.sort().values, torch.arange(len(lifted), device=order.device)):
        raise ValueError(f"order must hold each of the {len(lifted)} items of the gallery once")
    if isinstance(fractions, int):
        if fractions < 2:
            raise ValueError(f"fractions must be at least 2 points, got {fractions}")
        fractions = [i / (fractions - 1) for i in range(fractions)]
    points = sorted(map(float, fractions))
    if len(points) < 2 or points[0] < 0 or points[-1] > 1 or points[0] == points[-1]:
        raise ValueError(f"fractions must be different numbers in [0, 1], got {list(fractions)}")
    gallery = F.normalize(lifted, dim=1)
    recomputed = F.normalize(recomputed.to(gallery), dim=1)
    done, top1, mean_ap = 0, [], []
    for point in points:
        until = round(point * len(gallery))
        rows = order[done:until].to(gallery.device)
        gallery[rows] = recomputed[rows]
        done = until
        report = retrieval_report(
            query, gallery, query_labels, gallery_labels, k=[1], exclude_self=exclude_self
        )
        top1.append(report.cmc[1])
        mean_ap.append(report.mean_ap)
    areas = [
        sum(
            (b - a) * (low + high) / 2
            for a, b, low, high in zip(points, points[1:], ys, ys[1:], strict=False)
        )
        / (points[-1] - points[0])
        for ys in (top1, mean_ap)
    ]
    return BackfillCurve(tuple(points), tuple(top1), tuple(mean_ap), *areas)
