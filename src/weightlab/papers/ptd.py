"""Robustifying State-space Models for Long Sequences via Approximate Diagonalization (arXiv 2310.01698)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=10,
    slug="ptd",
    title="Robustifying State-space Models for Long Sequences via Approximate Diagonalization",
    authors=("Annan Yu", "Arnur Nigmetov", "Dmitriy Morozov", "Michael W. Mahoney", "N. Benjamin Erichson"),
    author_count=5,
    date="2023-10-02",
    arxiv="2310.01698",
    venue="ICLR 2024",
    code=("AnnanYu/Approximate_Diagonal",),
    summary=(
        "State-space models start from the HiPPO matrix, whose eigenvectors are far too ill-conditioned "
        "to use. S4D and S5 diagonalise its normal part only and drop the rest. The paper shows that this "
        "converges for each fixed smooth input but not uniformly: the transfer function keeps spikes, so "
        "that a sinusoid of the wrong frequency breaks the model. Perturb-then-diagonalise adds a small "
        "perturbation to the full matrix so that its eigenvectors become well-conditioned, diagonalises "
        "that exactly, and uses the result as initial values; model, kernel and cost stay as they are. "
        "The error of the transfer function is bounded by the size of the perturbation, uniformly in "
        "frequency. S4-PTD and S5-PTD average 86.6 and 87.6 on Long Range Arena, ahead of S4D and level "
        "with or slightly above S4 and S5, and withstand noise at the frequency where S4D collapses. The "
        "spike is about one radian wide and aliases away when the time step is too coarse, and the paper "
        "lacks the baseline of a plain random perturbation."
    ),
    room="linalg",
    parts=("linalg.approximate_diagonalize", "init.ssm_ptd_", "nn.S5"),
    keywords=(
        "state space model",
        "SSM",
        "S4",
        "S5",
        "S4-PTD",
        "HiPPO",
        "non-normal",
        "pseudospectrum",
        "eigenvectors",
        "long range arena",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
