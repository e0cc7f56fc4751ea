"""On the Provable Advantage of Unsupervised Pretraining (arXiv 2303.01566)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=38,
    slug="unsupervised-pretraining",
    title="On the Provable Advantage of Unsupervised Pretraining",
    authors=("Ge", "Tang", "Fan", "Jin"),
    author_count=4,
    date="2023-03-02",
    arxiv="2303.01566",
    venue="ICLR 2024 (spotlight)",
    summary=(
        "When does fitting a density model to many unlabelled points and then a small head to few labels "
        "provably beat supervised learning on the labels alone? A generic two-phase method is analysed: "
        "maximum likelihood for a latent-variable model, then empirical risk minimisation for the head. "
        "Under a condition that the observed data determine the latent variable up to changes that the "
        "head can undo, the excess risk splits into one term for the model class over the unlabelled "
        "sample and one for the head over the labelled sample. Factor models, Gaussian mixtures and "
        "contrastive learning are worked out. There are no experiments, the constants are loose, and the "
        "condition does much of the work. Where the factors are strong the labelled inputs alone reveal "
        "them, so the advantage should show for weak factors and many more unlabelled than labelled "
        "points."
    ),
    room="theory",
    parts=("theory.pretraining",),
    keywords=(
        "representation learning",
        "factor model",
        "Gaussian mixture",
        "contrastive learning",
        "excess risk",
        "semi-supervised",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
