"""Rich Feature Construction for the Optimization-Generalization Dilemma (arXiv 2203.15516)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=11,
    slug="rich-feature-construction",
    title="Rich Feature Construction for the Optimization-Generalization Dilemma",
    authors=("Jianyu Zhang", "David Lopez-Paz", "Léon Bottou"),
    author_count=3,
    date="2022-03",
    arxiv="2203.15516",
    venue="ICML 2022",
    code=("TjuJianyu/RFC",),
    summary=(
        "Penalties for out-of-distribution generalisation work only from a lucky start: from random "
        "weights the strong penalty cannot be optimised, and from a trained network the result depends on "
        "how long it was trained. Rich feature construction builds the start on purpose. Discovery "
        "episodes train fresh networks that may not rely on features found before, by minimising the "
        "worst loss over the groups where earlier models are right or wrong; a synthesis episode then "
        "distils all of them into one network on a re-balanced data set. Its features initialise the "
        "penalised training, or are frozen under it. On ColoredMNIST six penalties reach 66 to 70 % from "
        "these features, against 44 to 54 % from random weights; on Camelyon17 the mean rises and the "
        "spread falls. A well-timed ordinary start comes close for some penalties, and everything rests "
        "on the length of the first episode, which must stop while the easy feature still dominates. "
        "Seeds differ by several points, so five or more are needed."
    ),
    room="train",
    parts=("train.RichFeatures", "train.agreement_resample", "train.penalties"),
    keywords=(
        "Bonsai",
        "RFC",
        "out-of-distribution",
        "OoD",
        "IRM",
        "IRMv1",
        "vREx",
        "Fishr",
        "CLOvE",
        "IGA",
        "spectral decoupling",
        "invariance",
        "DRO",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
