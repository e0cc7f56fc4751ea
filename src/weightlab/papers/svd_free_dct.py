"""SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (arXiv 2505.17967)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=5,
    slug="svd-free-dct",
    title="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
    authors=("Modoranu", "Safaryan", "Schultheis", "Ryabinin", "Chumachenko", "Alistarh"),
    author_count=6,
    date="2025-05",
    arxiv="2505.17967",
    venue="ICLR 2026",
    code=("IST-DASLab/ISTA-DASLab-Optimizers",),
    summary=(
        "Low-rank optimizers keep Adam's moments, or an orthogonalised momentum, in a small subspace of "
        "each weight matrix, and usually find it with an SVD or QR that is slow and must be stored for "
        "every layer. Here one fixed orthogonal matrix per size, the discrete cosine transform, serves "
        "all layers: at each step the basis vectors best aligned with the gradient are picked by the norm "
        "of its coefficients, and only their indices are kept. With a fast Fourier transform the cost "
        "does not depend on the rank. Two optimizers are built on this: DCT-AdamW, with moments carried "
        "over when the subspace changes, and Trion, which is Dion with column selection in place of the "
        "power iteration. Parity with SVD-based methods at lower time and up to a quarter less memory is "
        "claimed. The selection is contractive for any orthogonal basis; on matrices without smooth axes "
        "the cosine basis does no better than a random one or plain coordinates. The official code resets "
        "the moments it means to rotate, at least on the CPU, and decodes its quantised error feedback in "
        "the wrong order. From the third version on the title speaks of FFT-based dynamic subspace "
        "selection."
    ),
    room="optim",
    parts=("optim.DCTAdamW", "optim.Trion", "linalg.dct", "linalg.dct_matrix", "linalg.select_basis_columns"),
    keywords=(
        "optimizer",
        "low rank",
        "GaLore",
        "Dion",
        "discrete cosine transform",
        "FFT",
        "memory efficient",
        "Makhoul",
        "error feedback",
        "FFT-based Dynamic Subspace Selection",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
