"""Approximating the Top Eigenvector in Random Order Streams (arXiv 2412.11963)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=20,
    slug="streaming-eigenvector",
    title="Approximating the Top Eigenvector in Random Order Streams",
    authors=("Kacham", "Woodruff"),
    author_count=2,
    date="2024-12",
    arxiv="2412.11963",
    venue="NeurIPS 2024 (spotlight)",
    summary=(
        "The rows of a matrix arrive once, in random order, and the top right singular vector is wanted "
        "in memory close to one row. Since the order is random, disjoint blocks of the stream are "
        "independent samples, so a power method may use a fresh block for each multiplication. This works "
        "as long as no row is too long; the few heavy rows above a threshold are stored, and their number "
        "is shown to be the right measure of the memory needed. The correlation with the truth is 1 - "
        "O(1/√R) for a ratio R of the leading squared singular values that need only be a constant, "
        "better than what was known for Oja's rule, for which a hard instance is given. It is a theory "
        "paper without experiments or code: how the stored rows are merged with the estimate is a "
        "reconstruction here that was checked numerically. The guarantee leans on the random order; a "
        "sorted stream breaks it, and the estimator is meant to notice."
    ),
    room="stream",
    parts=("stream.TopEigenvector", "stream.Oja", "stream.FrequentDirections"),
    keywords=(
        "PCA",
        "power method",
        "Oja",
        "streaming",
        "heavy rows",
        "sketching",
        "top singular vector",
        "one pass",
        "random order",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
