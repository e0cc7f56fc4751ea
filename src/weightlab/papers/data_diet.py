"""Deep Learning on a Data Diet: Finding Important Examples Early in Training (arXiv 2107.07075)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=27,
    slug="data-diet",
    title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    author_count=3,
    date="2021-07-14",
    arxiv="2107.07075",
    venue="NeurIPS 2021",
    code=("mansheej/data_diet",),
    summary=(
        "Much of a training set can be dropped if one knows which examples matter. Every example is "
        "scored early in training by how far it would move the weights: the expected norm of its loss "
        "gradient (GraNd), or its cheap stand-in, the norm of the error vector (EL2N), averaged over "
        "several independent runs. Examples with low scores are removed and a new network is trained on "
        "the rest for the same number of steps. The paper reports that half of CIFAR-10 can be dropped "
        "with no loss of test accuracy, and that the scores point at mislabelled examples. EL2N after "
        "some epochs has been reproduced by others; GraNd at initialisation has not (arXiv 2303.14753 "
        "traces the original figure to a checkpoint-restore error), so scores from an untrained network "
        "are no evidence. Keeping the hardest examples is expected to backfire when very little data is "
        "left."
    ),
    room="inspect",
    parts=("inspect.data_scores",),
    keywords=(
        "data pruning",
        "GraNd",
        "EL2N",
        "forgetting",
        "coreset",
        "label noise",
        "per-example gradients",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
