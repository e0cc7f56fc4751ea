"""Global Convergence of Sub-gradient Method for Robust Matrix Recovery (arXiv 2202.08788)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=13,
    slug="subgm",
    title=(
        "Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small "
        "Initialization, Noisy Measurements, and Over-parameterization"
    ),
    authors=("Ma", "Fattahi"),
    author_count=2,
    date="2022-02",
    arxiv="2202.08788",
    venue="JMLR 2023",
    summary=(
        "A positive semi-definite matrix of low rank is to be recovered from linear measurements of which "
        "a fraction is grossly wrong, with the rank unknown. The paper minimises the absolute error over "
        "a factor that may be far too wide, by the plain sub-gradient method from a tiny start with "
        "geometrically decaying, normalised steps. The signal directions grow to full size exponentially "
        "while the superfluous ones stay near their start, so that the final error is a power of the "
        "initial scale, independent of the assumed rank and of the size of the outliers, even where the "
        "global minimum of the loss is not the truth. With few measurements the error shrinks more slowly "
        "with the initial scale than the theory says. Under Gaussian noise the method is no better than "
        "least squares stopped early."
    ),
    room="optim",
    parts=("optim.SubGM", "optim.robust_recover"),
    keywords=(
        "sub-gradient",
        "matrix sensing",
        "matrix recovery",
        "robust",
        "outliers",
        "l1 loss",
        "small initialization",
        "over-parameterization",
        "low rank",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
