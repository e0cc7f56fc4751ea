"""How well queries find items of their class in a gallery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

# Similarities held at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RetrievalReport:
    """What queries found.

    Attributes:
        cmc: For each k, the share of queries with an item of their class among the k most similar ones.
        mean_ap: Mean over queries of the average precision, over the whole gallery.
        queries: Queries that counted.
        skipped: Queries left out because the gallery has no item of their class.
        first_ranks: Rank of the first item of its class for each query that counted, from 1, int64.
        average_precision: For each query that counted, float64.
    """

    cmc: dict[int, float]
    mean_ap: float
    queries: int
    skipped: int
    first_ranks: Tensor = field(repr=False, compare=False)
    average_precision: Tensor = field(repr=False, compare=False)


@torch.no_grad()
def retrieval_report(
    query: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    *,
    k: Sequence[int] = (1, 5, 10),
    exclude_self: bool = False,
) -> RetrievalReport:
    """Rank a gallery by cosine for each query, and tell how early items of the query's class come.

    Ties count against: of items that are equally similar those of other classes come first, so that the order of the gallery
    does not matter and a map that makes all alike earns nothing.

    Args:
        query: `(q, d)`, floating point; lengths do not matter.
        gallery: `(g, d)`.
        query_labels: `(q,)`, integers.
        gallery_labels: `(g,)`.
        k: For which k the share of queries with a hit among the first k (cumulative match characteristic) is told.
            Default 1, 5, 10.
        exclude_self: Whether row i of both is one item, which is to find others than itself. Default False.

    Raises:
        TypeError: If embeddings are not of floating-point type, or labels not integers.
        ValueError: If shapes do not fit, a row is zero or not finite, k is not positive, or no query's class is in the gallery.

    Complexity:
        `O(q·g·(d + log g))` time; memory for about 4 million similarities at a time, whatever the sizes.

    Reference:
        "Towards Backward-Compatible Representation Learning", arXiv 2003.11942: the measures, with queries by one model and
        the gallery by another.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> retrieval_report(x, x, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), k=[1], exclude_self=True)
        RetrievalReport(cmc={1: 1.0}, mean_ap=1.0, queries=4, skipped=0)
    """
    query, gallery = check_embeddings(query, "query"), check_embeddings(gallery, "gallery")
    if query.size(1) != gallery.size(1):
        raise ValueError(
            f"query and gallery must have equally many dimensions, got {query.size(1)} and {gallery.size(1)}; "
            "map one to the other's space first"
        )
    query_labels = check_labels(query_labels, len(query), "query_labels").to(query.device)
    gallery_labels = check_labels(gallery_labels, len(gallery), "gallery_labels").to(query.device)
    if not k or min(k) < 1:
        raise ValueError(f"k must be positive numbers, got {k}")
    if exclude_self and len(query) != len(gallery):
        raise ValueError(
            f"exclude_self needs query and gallery to be the same items, got {len(query)} and {len(gallery)}"
        )
    query, gallery = F.normalize(query, dim=1), F.normalize(gallery.to(query), dim=1)
    firsts, precisions = [], []
    for start in range(0, len(query), step := max(1, _CHUNK // len(gallery))):
        rows = torch.arange(start, min(start + step, len(query)), device=query.device)
        similarity = query[rows] @ gallery.T
        relevant = query_labels[rows, None] == gallery_labels
        if exclude_self:
            # Last of all and of no class, so that it takes no one's place.
            similarity.scatter_(1, rows[:, None], -torch.inf)
            relevant.scatter_(1, rows[:, None], value=False)
        first, precision = _ranks(similarity, relevant)
        counted = relevant.any(1)
        firsts.append(first[counted])
        precisions.append(precision[counted])
    first_ranks, average_precision = torch.cat(firsts), torch.cat(precisions)
    if not len(first_ranks):
        raise ValueError("no query's class is in the gallery; look whether the labels belong together")
    return RetrievalReport(
        cmc={each: float((first_ranks <= each).double().mean()) for each in k},
        mean_ap=float(average_precision.mean()),
        queries=len(first_ranks),
        skipped=len(query) - len(first_ranks),
        first_ranks=first_ranks,
        average_precision=average_precision,
    )


def _ranks(similarity: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the first relevant item of each row, and average precision; both are meaningless where there is none."""
    values, order = similarity.sort(dim=1, descending=True)
    hits = relevant.gather(1, order)
    counts = hits.cumsum(1)
    size = hits.size(1)
    places = torch.arange(size, device=hits.device)
    ends = torch.where(F.pad(values[:, :-1] != values[:, 1:], (0, 1), value=True), places, size)
    # Where the run of equal values ends that a place is in. Hits take its last places.
    ends = ends.flip(1).cummin(1).values.flip(1)
    ranks = ends + 1 - (counts.gather(1, ends) - counts)
    first = torch.where(hits, ranks, size).amin(1)
    precision = torch.where(hits, counts.double() / ranks, 0).sum(1) / counts[:, -1].clamp_min(1)
    return first, precision


def check_embeddings(embeddings: Tensor, name: str) -> Tensor:
    """Embeddings in at least float32, or an error: they must be a matrix of finite rows, none of them zero."""
    if not embeddings.is_floating_point():
        raise TypeError(f"{name} must be of floating-point type, got {embeddings.dtype}")
    if embeddings.ndim != 2 or embeddings.numel() == 0:
        raise ValueError(f"{name} must have shape (items, dimensions), got {tuple(embeddings.shape)}")
    embeddings = embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32))
    for bad, what in (
        (~embeddings.isfinite().all(1), "not finite"),
        (~embeddings.any(1), "zero, and have no direction to compare"),
    ):
        if bool(bad.any()):
            rows = bad.nonzero().flatten().tolist()
            some = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            raise ValueError(f"{len(rows)} rows of {name} are {what}: {some}; drop them, and their partners")
    return embeddings


def check_labels(labels: Tensor, items: int, name: str) -> Tensor:
    """Labels, or an error: they must be one integer for each item."""
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} must be integers, got {labels.dtype}")
    if labels.shape != (items,):
        raise ValueError(f"{name} must have shape ({items},), one for each item, got {tuple(labels.shape)}")
    return labels
