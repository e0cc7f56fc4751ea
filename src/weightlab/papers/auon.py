"""AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates (arXiv 2509.24320)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=9,
    slug="auon",
    title="AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates",
    authors=("Dipan Maity",),
    author_count=1,
    date="2025-09-29",
    arxiv="2509.24320",
    code=("ryyzn9/AuON",),
    summary=(
        "Muon orthogonalises the momentum matrix with Newton-Schulz iterations, at a cost that is cubic "
        "in the side of the matrix. AuON asks whether a bounded update is enough: it divides the momentum "
        "by its Frobenius norm and by the root-mean-square of the hyperbolic cosine of its entries, a "
        "scalar meant to act as an emergency brake on heavy tails, at a cost linear in the number of "
        "entries. A hybrid first runs one or more Newton-Schulz steps. The first version reports losses "
        "behind AdamW for AuON alone and close to Muon for the hybrid; later versions claim a hybrid "
        "ahead of Muon. Two published forms differ: the first version normalises the update, the current "
        "official code divides the momentum itself and so is linear in the gradient. Worked out, the cosh "
        "scalar is 1 + O(1/N) for any tensor of N entries, so the first form is normalised SGD with "
        "momentum, the second is Nesterov SGD on an exponential average, the hybrid is Muon without its "
        "rescaling, and none of them changes the conditioning of the update."
    ),
    room="optim",
    parts=("optim.AuON", "optim.HybridAuON"),
    keywords=("optimizer", "momentum", "normalized sgd", "cosh", "one buffer", "low memory", "Newton-Schulz"),
)

CLAIMS: tuple[Claim, ...] = ()
