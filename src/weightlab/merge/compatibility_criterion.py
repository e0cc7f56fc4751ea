"""Whether maps make a new embedding model compatible with an old one's gallery, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlab.merge.compatibility import CompatibilityAdapter
from weightlab.merge.retrieval import RetrievalReport, retrieval_report


@dataclass(frozen=True)
class CompatibilityReport:
    """Searches by and in old and new embeddings, with and without maps.

    Attributes:
        searches: By `"queries / gallery"`: `"old / old"`, `"new / new"`, `"new / old"` (no map; only for equal dimensions),
            `"mapped / old"`, `"mapped / mapped"` and, with a forward map, `"mapped / lifted"`.
        deviation: D of the backward map.
        compatible: Whether mapped queries find more in the old gallery than old ones do, by top-1: the criterion for which
            an upgrade is worth having without any backfill.
        self_drop: Top-1 that the map costs in a gallery of new embeddings, in points of one: `new / new` less
            `mapped / mapped`.
    """

    searches: dict[str, RetrievalReport]
    deviation: float
    compatible: bool
    self_drop: float


@torch.no_grad()
def compatibility_report(
    adapter: CompatibilityAdapter,
    new_query: Tensor,
    old_query: Tensor,
    query_labels: Tensor,
    new_gallery: Tensor | None = None,
    old_gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    k: Sequence[int] = (1, 5, 10),
) -> CompatibilityReport:
    """Search old and new galleries by old and new queries.

    Args:
        adapter: The maps.
        new_query: `(q, d_new)`, queries by the new model.
        old_query: `(q, d_old)`, the same by the old one.
        query_labels: `(q,)`.
        new_gallery: `(g, d_new)`. Default: the queries, each of which is then to find others than itself.
        old_gallery: `(g, d_old)`.
        gallery_labels: `(g,)`.
        k: As in `retrieval_report`.

    Raises:
        TypeError: As `retrieval_report`.
        ValueError: As `retrieval_report`, or if only some of the gallery's arguments are given.

    Reference:
        "Towards Backward-Compatible Representation Learning", arXiv 2003.11942: the criterion.

    Example:
        >>> from weightlab.merge import fit_adapter
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> report = compatibility_report(fit_adapter(x, x, kind="orthogonal"), x, x, y, k=[1])
        >>> report.self_drop, report.compatible
        (0.0, False)
    """
    given = (new_gallery, old_gallery, gallery_labels)
    alone = all(part is None for part in given)
    if not alone and any(part is None for part in given):
        raise ValueError("new_gallery, old_gallery and gallery_labels go together: give all or none")
    new_g, old_g, labels = (new_query, old_query, query_labels) if alone else given
    assert new_g is not None
    assert old_g is not None
    assert labels is not None
    mapped, mapped_g = adapter.to_old(new_query), adapter.to_old(new_g)
    pairs = {"old / old": (old_query, old_g), "new / new": (new_query, new_g)}
    if new_query.size(-1) == old_g.size(-1):
        pairs["new / old"] = (new_query, old_g)
    pairs |= {"mapped / old": (mapped, old_g), "mapped / mapped": (mapped, mapped_g)}
    if adapter.forward_map is not None:
        pairs["mapped / lifted"] = (mapped, adapter.lift(old_g))
    searches = {
        name: retrieval_report(query, gallery, query_labels, labels, k=sorted({1, *k}), exclude_self=alone)
        for name, (query, gallery) in pairs.items()
    }
    top1 = {name: report.cmc[1] for name, report in searches.items()}
    return CompatibilityReport(
        searches,
        adapter.deviation,
        top1["mapped / old"] > top1["old / old"],
        top1["new / new"] - top1["mapped / mapped"],
    )
