"""JLCM: jointly learnable codebooks and mappings (arXiv 2309.17361)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=17,
    slug="jlcm",
    title="Network Memory Footprint Compression Through Jointly Learnable Codebooks and Mappings",
    authors=("E. Yvinec", "A. Dapogny", "K. Bailly"),
    author_count=3,
    date="2023-09",
    arxiv="2309.17361",
    venue="ICLR 2024",
    summary=(
        "A weight tensor is stored as small integer indices and a table of values, after training and "
        "with a small calibration set. Neurons with similar weight distributions are grouped and share a "
        "codebook or a scale; since rows can be reordered, this granularity costs no memory for the "
        "mapping. Codebook values and the index of every weight are then learned jointly, by gradient "
        "descent on the reconstruction of each layer's output, and the gradient of the index is replaced "
        "by one that prefers nearby codewords: a proximal search rather than jumps to the extremes. Llama "
        "7B in two gigabytes is the headline, with better accuracy at equal size than earlier codebook "
        "and uniform methods. Clustering features, the kernel of the new gradient and the defaults are "
        "reconstructed here, as the paper leaves them open. An adaptive optimizer may hide the difference "
        "between the two gradients, a lower reconstruction error need not show in accuracy, and a "
        "learning rate shared by all arms makes the default gradient look far worse than it is."
    ),
    room="compress",
    parts=(
        "compress.CodebookConfig",
        "compress.compress_codebook",
        "compress.CodebookLinear",
        "compress.kmeans1d",
    ),
    keywords=(
        "JLCM",
        "quantization",
        "codebook",
        "k-means",
        "palettization",
        "clustering",
        "post-training",
        "proximal",
        "weight compression",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
