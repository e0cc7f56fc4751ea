"""Train longer, generalize better (arXiv 1705.08741)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=30,
    slug="ghost-batch-norm",
    title=(
        "Train longer, generalize better: closing the generalization gap in large batch training of "
        "neural networks"
    ),
    authors=("Hoffer", "Hubara", "Soudry"),
    author_count=3,
    date="2017-05",
    arxiv="1705.08741",
    venue="NIPS 2017",
    code=("eladhoffer/bigBatch",),
    summary=(
        "Large batches trained for the same number of epochs generalise worse. The paper models the early "
        "phase as a random walk in a random potential, finds that the distance from the initial weights "
        "grows with the logarithm of time, and concludes that the gap comes from too few updates rather "
        "than from the batch itself. Its remedies add up: scale the learning rate with the square root of "
        "the batch ratio, compute batch-norm statistics over small ghost batches inside the large one, "
        "keep the number of updates by training for more epochs, and clip gradients early. With all of "
        "them the reported gap closes on several image benchmarks. The printed formula for the running "
        "statistics has an exponent that does not make its weights sum to one; the official code is "
        "right. Ghost normalisation acts as a noise regulariser whose strength depends on the ghost size, "
        "so how far it closes this particular gap is open."
    ),
    room="nn",
    parts=("nn.GhostBatchNorm1d", "nn.GhostBatchNorm2d", "nn.GhostBatchNorm3d", "train.large_batch"),
    keywords=(
        "large batch",
        "generalisation gap",
        "batch normalisation",
        "learning-rate scaling",
        "random walk",
        "training regime",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
