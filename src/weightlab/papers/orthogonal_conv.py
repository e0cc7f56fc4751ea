"""Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks (arXiv 2108.05623)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=3,
    slug="orthogonal-conv",
    title="Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
    author_count=3,
    date="2021-08",
    arxiv="2108.05623",
    venue="JMLR 23(347), 2022",
    code=("deel-ai/deel-lip",),
    summary=(
        "A convolution is a large structured matrix. The paper asks for which channels, kernels, strides "
        "and paddings an exactly orthogonal convolution exists, what a cheap penalty on the small kernel "
        "tensor says about the large matrix, and how that penalty behaves in training. With circular "
        "padding nearly every layer in use has an orthogonal version; with zero padding almost none has. "
        "The penalty equals, exactly, the squared Frobenius distance of the matrix from orthogonality "
        "divided by the number of output pixels, and bounds the spectral distance independently of the "
        "image size. Gradient descent on it is claimed to succeed from nearly every start, except for "
        "layers whose matrix is square, where it is caught in poor minima in part of the runs. On "
        "CIFAR-10 and Imagenette its weight trades clean accuracy for robust accuracy. The algebra can be "
        "checked to rounding; the accuracy trade depends on the weight of the penalty relative to the "
        "loss, and needs several seeds."
    ),
    room="nn",
    parts=(
        "init.conv_orthogonal_",
        "nn.conv_orth_loss",
        "nn.orthogonal_conv_exists",
        "nn.OrthogonalityPenalty",
        "inspect.conv_singular_values",
        "inspect.conv_sigma_bounds",
    ),
    keywords=(
        "OCNN",
        "convolution",
        "orthogonality regularization",
        "singular values",
        "Lipschitz",
        "circular padding",
        "robustness",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
