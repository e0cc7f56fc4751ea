"""The catalogue of papers: their facts, their claims, and what re-measuring the claims gave.

`weightlab.papers.reproduce` is the module that re-measures claims, `weightlab.papers.record` the one
that keeps the results.
"""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.papers import catalogue as catalogue
    from weightlab.papers import display as display
    from weightlab.papers import record as record
    from weightlab.papers import reproduce as reproduce
    from weightlab.papers.catalogue import Entry as Entry
    from weightlab.papers.catalogue import all_papers as all_papers
    from weightlab.papers.catalogue import get as get
    from weightlab.papers.catalogue import search as search
    from weightlab.papers.catalogue import to_json as to_json
    from weightlab.papers.schema import Claim as Claim
    from weightlab.papers.schema import ClaimContext as ClaimContext
    from weightlab.papers.schema import ClaimResult as ClaimResult
    from weightlab.papers.schema import Paper as Paper

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        **dict.fromkeys(("catalogue", "display", "record", "reproduce"), ""),
        **dict.fromkeys(("Entry", "all_papers", "get", "search", "to_json"), ".catalogue"),
        **dict.fromkeys(("Claim", "ClaimContext", "ClaimResult", "Paper"), ".schema"),
    },
)
