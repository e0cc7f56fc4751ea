"""Oscillation-free Quantization for Low-bit Vision Transformers (arXiv 2302.02210)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=35,
    slug="ofq",
    title="Oscillation-free Quantization for Low-bit Vision Transformers",
    authors=("S.-Y. Liu", "Z. Liu", "K.-T. Cheng"),
    author_count=3,
    date="2023-02",
    arxiv="2302.02210",
    venue="ICML 2023",
    code=("nbasyl/OFQ",),
    summary=(
        "In quantisation-aware training latent weights sit near rounding thresholds and their quantised "
        "values jump back and forth. The paper argues that a learned step size makes this worse, because "
        "weights and scale chase each other, and offers three remedies: a scale that is a statistic of "
        "the weights (StatsQ), a short final phase in which only weights near a threshold may still move "
        "(confidence-guided annealing), and quantising the product of query and key matrices of each head "
        "instead of the two apart. It reports large gains for DeiT and Swin at two to four bits, with "
        "distillation from the full-precision model. Its quantiser has no zero level, and the query-key "
        "form costs more arithmetic with every head. In the official code the annealing mask has no "
        "effect on the query-key product, one-bit levels are wrong, and biases of queries and keys in a "
        "checkpoint are dropped silently."
    ),
    room="compress",
    parts=(
        "compress.StatsQ",
        "compress.stats_quantize",
        "compress.LSQ",
        "compress.QKRAttention",
        "compress.ConfidenceGuidedAnnealing",
        "compress.OscillationTracker",
    ),
    keywords=(
        "quantisation-aware training",
        "QAT",
        "LSQ",
        "low bit",
        "vision transformer",
        "oscillation",
        "attention",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
