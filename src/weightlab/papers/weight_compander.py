"""Weight Compander: A Simple Weight Reparameterization for Regularization (arXiv 2306.16993)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=29,
    slug="weight-compander",
    title="Weight Compander: A Simple Weight Reparameterization for Regularization",
    authors=("R. Cakaj", "J. Mehnert", "B. Yang"),
    author_count=3,
    date="2023-06",
    arxiv="2306.16993",
    summary=(
        "Every weight is stored as a latent number and used through an odd, smooth, bounded and "
        "increasing function, a compander as in audio. Bounded weights keep any single one from "
        "dominating, and the slope, largest near zero, moves small weights away from zero faster, so that "
        "more weights take part in a decision. In the extended form the function's parameters are learned "
        "together with the weights. The method is meant to be added to weight decay, dropout and batch "
        "normalisation, and the paper reports better test accuracy on CIFAR, TinyImageNet and ImageNet. "
        "Only the abstract and what follows from it are confirmed here: the arctangent form implemented "
        "is a reconstruction, and the paper's constants and schedule are unknown. Whether the gain "
        "remains once weight decay is tuned for both sides is open. No official code is known."
    ),
    room="nn",
    parts=("nn.WeightCompander", "nn.compand", "nn.compand_param_groups"),
    keywords=(
        "regularisation",
        "reparameterisation",
        "parametrization",
        "bounded weights",
        "arctangent",
        "generalisation",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
