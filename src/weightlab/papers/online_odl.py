"""Online Orthogonal Dictionary Learning Based on Frank-Wolfe Method (arXiv 2103.01484)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=7,
    slug="online-odl",
    title="Online Orthogonal Dictionary Learning Based on Frank-Wolfe Method",
    authors=("Xue", "Lau"),
    author_count=2,
    date="2021-03",
    arxiv="2103.01484",
    summary=(
        "The task is to learn an orthogonal dictionary in which a stream of data is sparse, one mini- "
        "batch at a time, with no stored past and no sparse-coding problem. Maximising a moment of the "
        "coefficients higher than the second drives them to be spiky; for Bernoulli-Gaussian data the "
        "maximisers are the true dictionary up to order and sign. The orthogonal group is relaxed to the "
        "unit ball of the spectral norm, so that each Frank-Wolfe step is one polar factor and the "
        "iterate stays feasible, and a running average replaces the full gradient. The gap is claimed to "
        "shrink like ln t / t^(1/4), with experiments on synthetic data and on sensor readings. Exponents "
        "and constants of the schedule are reconstructed here from the stated rate, and nearby choices "
        "can fail. Against online dictionary learning with a well-chosen penalty the advantage to expect "
        "is speed and one knob less, not accuracy."
    ),
    room="stream",
    parts=("stream.OnlineOrthogonalDictionary",),
    keywords=(
        "sparse coding",
        "dictionary learning",
        "Frank-Wolfe",
        "streaming",
        "partial_fit",
        "ICA",
        "polar factor",
        "one pass",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
