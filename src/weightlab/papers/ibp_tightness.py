"""Understanding Certified Training with Interval Bound Propagation (arXiv 2306.10426)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=34,
    slug="ibp-tightness",
    title="Understanding Certified Training with Interval Bound Propagation",
    authors=("Y. Mao", "M. N. Müller", "M. Fischer", "M. Vechev"),
    author_count=4,
    date="2023-06",
    arxiv="2306.10426",
    venue="ICLR 2024",
    code=("eth-sri/ibp-propagation-tightness",),
    summary=(
        "How far do layer-by-layer interval bounds over-estimate the best possible box? The paper defines "
        "propagation tightness, the ratio of the optimal to the propagated box width, gives it in closed "
        "form for deep linear networks, and applies it to the local linearisation of ReLU networks. At "
        "Gaussian initialisation tightness falls polynomially with width and exponentially with depth; "
        "interval training raises it, and exactness forces a strong sign structure on the weights, which "
        "explains the trade of accuracy for robustness. It is claimed that standard and adversarial "
        "training do not raise it and that wider networks certify better. Tightness is neither necessary "
        "nor sufficient for certified accuracy. The recorded values of very deep networks hit the clamp "
        "in the official code and are upper bounds, and in small networks ordinary training may raise "
        "tightness as well, so the claim is best read as a ratio."
    ),
    room="certify",
    parts=("certify.propagation_tightness", "certify.tightness_gaussian", "certify.is_propagation_invariant"),
    keywords=(
        "interval bound propagation",
        "IBP",
        "robustness",
        "tightness",
        "deep linear networks",
        "SABR",
        "certified accuracy",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
