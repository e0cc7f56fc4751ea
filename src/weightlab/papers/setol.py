"""SETOL: A Semi-Empirical Theory of (Deep) Learning (arXiv 2507.17912)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=28,
    slug="setol",
    title="SETOL: A Semi-Empirical Theory of (Deep) Learning",
    authors=("C. H. Martin", "C. Hinrichs"),
    author_count=2,
    date="2025-07",
    arxiv="2507.17912",
    code=(
        "CalculatedContent/setol_paper",
        "charlesmartin14/SETOL_experiments",
        "CalculatedContent/WeightWatcher",
    ),
    summary=(
        "Each weight matrix of a trained network is read through the eigenvalues of its correlation "
        "matrix. Well-trained layers show a power-law tail, whose exponent, alone or scaled by the "
        "largest eigenvalue, is claimed to predict quality without any data. SETOL derives both measures "
        "from a matrix student-teacher model and adds a condition without a fit: the eigenvalues of the "
        "tail that carries generalisation multiply to one. An ideal layer has exponent two, and both "
        "tails coincide there. The derivation is semi-empirical: its formulas are formal, and simpler "
        "measures such as the norm can rank models as well, so they belong beside it in any test; across "
        "networks of different depth the plain exponent need not follow test error. The reference tool "
        "multiplies eigenvalues directly and under- or overflows for wide layers, which a computation "
        "with logarithms avoids."
    ),
    room="inspect",
    parts=("inspect.esd", "inspect.fit_power_law", "inspect.erg_count", "inspect.layer_report"),
    keywords=(
        "power law",
        "heavy tails",
        "spectral density",
        "weightwatcher",
        "alpha",
        "random matrix",
        "layer quality",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
