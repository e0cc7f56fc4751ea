"""Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching (arXiv 2402.04051)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=26,
    slug="weight-matching",
    title="Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching",
    authors=("Ito", "Yamada", "Kumagai"),
    author_count=3,
    date="2024-02",
    arxiv="2402.04051",
    venue="ICLR 2025",
    summary=(
        "Two networks trained from different seeds often become linearly connected once the hidden units "
        "of one are permuted so that the weights match. The paper asks why. The distance between the "
        "weights shrinks by a modest fraction only; but a permutation, which cannot change singular "
        "values, turns the singular vectors of large singular values into agreement, and those carry the "
        "function, so the average of both networks keeps it. Matching by activations works on the same "
        "principle, whereas permutations found with a straight-through estimator lower the loss between "
        "two given models without aligning singular vectors and do not extend to three or more. The "
        "matching problem is solved by coordinate descent over assignment problems, which is not exact: "
        "it can stop at a poor local optimum even where a perfect match exists, so restarts belong to the "
        "method. Networks with batch normalisation need their statistics recomputed after averaging. No "
        "official code is known; the work builds on samuela/git-re-basin."
    ),
    room="merge",
    parts=(
        "merge.PermutationSpec",
        "merge.weight_matching",
        "merge.activation_matching",
        "merge.ste_matching",
        "merge.apply_permutation",
        "merge.interpolate",
        "merge.loss_barrier",
        "merge.singular_alignment",
        "merge.check_equivalence",
    ),
    keywords=(
        "git re-basin",
        "permutation symmetry",
        "model merging",
        "loss barrier",
        "singular vectors",
        "linear assignment",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
