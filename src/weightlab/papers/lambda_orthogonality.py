"""λ-Orthogonality Regularization for Compatible Representation Learning (arXiv 2509.16664)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=12,
    slug="lambda-orthogonality",
    title="λ-Orthogonality Regularization for Compatible Representation Learning",
    authors=("Ricci", "Biondi", "Pernici", "Patras", "Del Bimbo"),
    author_count=5,
    date="2025-09",
    arxiv="2509.16664",
    venue="NeurIPS 2025",
    code=("miccunifi/lambda_orthogonality",),
    summary=(
        "A retrieval system holds a gallery embedded by an old model, and computing it anew for a better "
        "model is expensive. Small maps between the two frozen spaces can make them compatible: one takes "
        "new queries to the old gallery, one lifts the old gallery. A free affine map adapts best but "
        "destroys the geometry of the new space; a strictly orthogonal one preserves all angles but "
        "cannot adapt. The paper trains an affine map whose weight may leave orthogonality only up to a "
        "tolerance λ, through a smooth gate on the penalty. Near-unchanged performance of the new model "
        "together with cross-retrieval at the level of affine maps is claimed, across architectures and "
        "data sets. The exact form of the gate, the weights of the losses and the schedule are a "
        "reconstruction here and are therefore arguments. Preserving the new model is the easier half to "
        "show; a gain in adaptation over a strictly orthogonal map needs a target that such a map cannot "
        "reach, and many seeds."
    ),
    room="nn",
    parts=("nn.OrthogonalityPenalty", "nn.relaxed_orthogonal", "merge.fit_adapter", "merge.retrieval_report"),
    keywords=(
        "lambda",
        "compatible representations",
        "backward compatibility",
        "backfilling",
        "retrieval",
        "embedding",
        "orthogonal map",
        "affine adapter",
        "model update",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
