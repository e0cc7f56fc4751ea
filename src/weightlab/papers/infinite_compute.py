"""Pre-training under infinite compute (arXiv 2509.14786)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=37,
    slug="infinite-compute",
    title="Pre-training under infinite compute",
    authors=("Kim", "Kotha", "Liang", "Hashimoto"),
    author_count=4,
    date="2025-09-18",
    arxiv="2509.14786",
    venue="ICLR 2026 (oral)",
    code=("marin-community/marin",),
    summary=(
        "Compute grows faster than text, so the question is the best loss at fixed data and unlimited "
        "compute. Raising epochs or parameters naively overfits; jointly tuned weight decay, some thirty "
        "times the usual value, with learning rate and epochs makes the loss fall as a power law in model "
        "size. Ensembles of independently trained models have a lower asymptote than one ever larger "
        "model, both limits compose, and most of an ensemble's gain can be distilled into one small "
        "student by training on its samples. Recipes are compared by the asymptote of a fitted scaling "
        "law and stated as data efficiency, with a factor of about five for the full recipe. The fits use "
        "few points for three parameters and respond strongly to small changes of the losses, so "
        "asymptotes and efficiency factors need intervals."
    ),
    room="train",
    parts=("train.regularized_recipe", "train.Ensemble", "train.distill", "theory.scaling_laws"),
    keywords=(
        "data efficiency",
        "weight decay",
        "epochs",
        "ensembles",
        "distillation",
        "scaling laws",
        "language model",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
