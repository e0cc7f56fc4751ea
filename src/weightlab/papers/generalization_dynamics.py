"""High-dimensional dynamics of generalization error in neural networks (arXiv 1710.03667)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=22,
    slug="generalization-dynamics",
    title="High-dimensional dynamics of generalization error in neural networks",
    authors=("Advani", "Saxe"),
    author_count=2,
    date="2017-10",
    arxiv="1710.03667",
    venue="Neural Networks 2020",
    summary=(
        "A linear student learns by gradient flow from noisy examples of a linear teacher, with as many "
        "examples as dimensions up to a fixed ratio. Random-matrix theory then gives the whole curves of "
        "training and test error over time from four numbers: that ratio, the signal-to-noise ratio, the "
        "variance of the initial weights, and time. Overtraining is worst where examples equal "
        "dimensions, because small but non-zero eigenvalues amplify noise; with fewer examples than "
        "dimensions a frozen subspace never learns, which protects from overfitting and keeps whatever "
        "the initial weights left there, so small initial weights matter. Optimal early stopping is "
        "claimed to be nearly as good as optimal weight decay, and nonlinear networks to show the same "
        "picture when parameters and samples are counted. The linear results are exact for isotropic "
        "inputs in the limit of large dimension; the nonlinear and deep parts are qualitative, and real "
        "data needs an estimate of the signal-to-noise ratio that few samples identify poorly. No "
        "official code is known."
    ),
    room="theory",
    parts=(
        "theory.marchenko_pastur",
        "theory.generalization_curve",
        "theory.optimal_stopping",
        "theory.optimal_weight_decay",
        "inspect.data_spectrum",
    ),
    keywords=(
        "double descent",
        "early stopping",
        "ridge",
        "random matrix",
        "linear regression",
        "student teacher",
        "overfitting",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
