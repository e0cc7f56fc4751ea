"""The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well (arXiv 2506.07661)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=32,
    slug="universality-lens",
    title="The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well",
    authors=("Feder", "Urbanke", "Fogel"),
    author_count=3,
    date="2025-06-09",
    arxiv="2506.07661",
    summary=(
        "Learning is treated as universal prediction under log-loss: the learner is the Bayesian mixture "
        "over a huge class of hypotheses with a nearly uniform prior. Its regret is governed not by the "
        "size of the class but by the prior mass of the hypotheses close to the truth, so a simple truth "
        "has a heavy neighbourhood and needs few samples, and further parameters cost nothing as long as "
        "that neighbourhood stays heavy. Langevin sampling with averaged predictions approximates the "
        "mixture; flat minima and distillation are read in the same way. The work is theory, with no "
        "experiments or tables, and version 2 carries another title. A uniform prior over parameters is "
        "not enough by itself: what makes a truth simple is the prior over functions that the "
        "architecture induces."
    ),
    room="theory",
    parts=("theory.universality", "optim.SGLD"),
    keywords=(
        "Bayesian mixture",
        "regret",
        "description length",
        "Langevin",
        "SGLD",
        "flat minima",
        "ensembles",
        "over-parametrisation",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
