"""Exact solutions to the nonlinear dynamics of learning in deep linear neural networks (arXiv 1312.6120)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=15,
    slug="deep-linear-dynamics",
    title="Exact solutions to the nonlinear dynamics of learning in deep linear neural networks",
    authors=("Saxe", "McClelland", "Ganguli"),
    author_count=3,
    date="2013-12",
    arxiv="1312.6120",
    venue="ICLR 2014",
    summary=(
        "A deep network without non-linearities computes a linear map, yet gradient descent on its "
        "factors is non-linear in time. For whitened inputs and suitably decoupled weights the equations "
        "split into one scalar equation per singular mode of the input-output correlation, each solved in "
        "closed form: a plateau, then a sigmoidal rise, in a time inversely proportional to the strength "
        "of the mode. The same analysis shows that learning time stays finite as depth grows when modes "
        "start at order one, and motivates random orthogonal initial weights, whose products keep all "
        "singular values equal while those of Gaussian matrices do not. For non-linear networks the "
        "orthogonal start wants a gain slightly above the critical one. The closed forms hold to rounding "
        "in their setting; their predictions fail for initial weights that are not small against the "
        "mode, for correlated inputs and for large learning rates. The advantage of orthogonal starts "
        "grows with depth and is small for shallow networks."
    ),
    room="theory",
    parts=(
        "init.orthogonal_",
        "init.aligned_",
        "theory.linear_mode_curve",
        "theory.learning_time",
        "theory.optimal_lr",
        "inspect.modes",
        "inspect.jacobian_spectrum",
    ),
    keywords=(
        "deep linear network",
        "orthogonal initialization",
        "dynamical isometry",
        "edge of chaos",
        "learning curve",
        "singular modes",
        "gradient flow",
        "depth",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
