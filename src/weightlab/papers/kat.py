"""Kolmogorov-Arnold Transformer (arXiv 2409.10594)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=4,
    slug="kat",
    title="Kolmogorov-Arnold Transformer",
    authors=("Xingyi Yang", "Xinchao Wang"),
    author_count=2,
    date="2024-09-16",
    arxiv="2409.10594",
    venue="ICLR 2025",
    code=("Adamdad/kat", "Adamdad/rational_kat_cu"),
    summary=(
        "A Kolmogorov-Arnold network learns a scalar function on every edge, which is slow, large and "
        "badly scaled at the start. KAT keeps the idea affordable: the function is a rational one, shared "
        "by a group of input channels, so that a layer becomes a group-wise rational activation followed "
        "by a linear map. The two-layer MLP of a transformer block turns into rational, linear, rational, "
        "linear; because the first rational starts as the identity and the second as Swish or GELU, a "
        "pretrained vision transformer can be loaded and continues from its own function. Initial weights "
        "are scaled by the gain of the rational so that the signal keeps its size with depth. The paper "
        "reports 82.3 % on ImageNet for the base model against 79.1 % for ViT-B, although better-trained "
        "baselines of that size, such as DeiT-B at 81.8 %, come close. The official kernels are two "
        "orders of magnitude slower than an MLP, as later work measured, and the small official examples "
        "range from no gain to a few points, at three times the time."
    ),
    room="nn",
    parts=(
        "nn.GroupRational",
        "nn.GRKANLinear",
        "nn.GRKANMLP",
        "nn.functional.group_rational",
        "nn.fit_rational",
        "init.calculate_rational_gain",
    ),
    keywords=(
        "KAN",
        "GR-KAN",
        "rational activation",
        "Padé",
        "vision transformer",
        "ViT",
        "learnable activation",
        "FlashKAT",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
