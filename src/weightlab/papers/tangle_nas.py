"""Weight-Entanglement Meets Gradient-Based Neural Architecture Search (arXiv 2312.10440)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=39,
    slug="tangle-nas",
    title="Weight-Entanglement Meets Gradient-Based Neural Architecture Search",
    author_count=4,
    date="2023-12",
    arxiv="2312.10440",
    venue="AutoML 2024",
    code=("automl/TangleNAS",),
    summary=(
        "In a weight-entangled supernet every candidate operator is a slice of one largest weight, so "
        "memory does not grow with the number of choices; such spaces used to be searched in two stages, "
        "by sampling and then evolution. TangleNAS mixes the weights before the operation instead of the "
        "outputs after it: slices are padded to the largest shape, scaled by architecture weights and "
        "summed, and one operation is run, which keeps single-stage gradient search and its memory "
        "advantage. The paper reports results comparable to or better than two-stage search on "
        "convolutional, transformer and language-model spaces. Since slices are prefixes or centred "
        "crops, the whole sum collapses to one product with survival vectors, much cheaper than the "
        "official loop. The soft layer norm of the official code takes its statistics over all channels, "
        "so an extracted sub-network is not quite the function that was searched."
    ),
    room="grow",
    parts=(
        "grow.EntangledLinear",
        "grow.EntangledConv2d",
        "grow.EntangledLayerNorm",
        "grow.EntangledEmbedding",
        "grow.EntangledMultiheadAttention",
        "grow.superpose",
        "grow.ArchParameter",
        "grow.Supernet",
        "grow.BilevelSearch",
    ),
    keywords=(
        "neural architecture search",
        "NAS",
        "supernet",
        "DARTS",
        "DrNAS",
        "GDAS",
        "weight sharing",
        "once-for-all",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
