"""On the Parameterization and Initialization of Diagonal State Space Models (arXiv 2206.11893)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=19,
    slug="s4d",
    title="On the Parameterization and Initialization of Diagonal State Space Models",
    authors=("Gu", "Gupta", "Goel", "Ré"),
    author_count=4,
    date="2022-06-23",
    arxiv="2206.11893",
    venue="NeurIPS 2022",
    code=("state-spaces/s4",),
    summary=(
        "A linear state-space layer is a long convolution whose kernel comes from a state matrix. S4 "
        "needs a matrix that is diagonal plus low rank, with an elaborate kernel. S4D shows why a purely "
        "diagonal one works when it starts from the normal part of the HiPPO matrix, gives simpler starts "
        "in closed form, and separates the design choices: discretisation, how real parts are kept "
        "negative, whether the input matrix is trained. The kernel becomes a Vandermonde product of two "
        "lines. About 85 % on Long Range Arena is reported, close to S4; the three structured starts are "
        "said to be within a point of each other and random or real ones several points worse, while "
        "discretisation matters little. The convergence to S4's kernel is weak: outputs for smooth inputs "
        "approach each other like one over the state size, but the kernels themselves do not pointwise, "
        "which later work turned into a criticism. The range of the time step sets the memory horizon and "
        "is the knob that decides such comparisons."
    ),
    room="nn",
    parts=("nn.S4DKernel", "nn.S4D", "init.s4d_init", "nn.functional.vandermonde_kernel", "linalg.hippo"),
    keywords=(
        "S4D",
        "state space model",
        "SSM",
        "S4",
        "HiPPO",
        "Vandermonde",
        "long convolution",
        "long range arena",
        "ZOH",
        "bilinear",
        "DSS",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
