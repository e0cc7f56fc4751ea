"""SORSA (arXiv 2409.00055)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=25,
    slug="sorsa",
    title=(
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language "
        "Models"
    ),
    authors=("Cao", "Song"),
    author_count=2,
    date="2024-08-21",
    arxiv="2409.00055",
    code=("Gunale0926/SORSA",),
    summary=(
        "The leading singular triples of each adapted weight become a trainable adapter in three factors "
        "(left vectors, values, right vectors) and the rest of the matrix is frozen. A regulariser with a "
        "step size of its own keeps both sets of vectors nearly orthonormal, so that scale lives in the "
        "singular values and the structure of the pre-trained matrix is disturbed little. The adapter "
        "merges into the weight. The paper reports faster convergence and higher accuracy on mathematical "
        "reasoning than LoRA, PiSSA, AdaLoRA and full fine-tuning, and later versions argue that the "
        "regulariser lowers the condition number. The comparison is doubtful: the released scripts train "
        "SORSA at a higher learning rate than the baselines, and under AdamW the regulariser's strength "
        "depends on the learning rate and on the number of adapted layers, unlike the published equation. "
        "One author up to version 5, two since version 6."
    ),
    room="adapters",
    parts=("adapters.SorsaConfig", "adapters.sorsa_regularizer", "adapters.SorsaCallback"),
    keywords=("LoRA", "PiSSA", "peft", "SVD", "orthonormality", "fine-tuning", "condition number"),
)

CLAIMS: tuple[Claim, ...] = ()
