"""SVFit (arXiv 2409.05926)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=23,
    slug="svfit",
    title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
    authors=("Sun", "Wei", "Wu", "Shi", "He", "Ma", "Xie", "Yang"),
    author_count=8,
    date="2024-09-09",
    arxiv="2409.05926",
    summary=(
        "Each adapted weight is decomposed once by singular value decomposition; the singular vectors "
        "stay frozen and only the largest singular values are trained, starting from their own values, so "
        "the model is unchanged at first. The trained numbers rescale the matrix's own main directions, "
        "and the result merges back into the weight at no inference cost. The paper claims better results "
        "than LoRA, and than PiSSA, with sixteen times fewer trainable parameters in language "
        "understanding, image classification and image generation. That ratio implies that nearly all "
        "singular values are trained, although the text speaks of a leading part that holds most of the "
        "information, by a measure it does not define. Learning rates must be far larger than LoRA's. A "
        "pure rescaling can be too weak when the target domain is far from the original one. No official "
        "code is known."
    ),
    room="adapters",
    parts=("adapters.SvfitConfig", "linalg.top_svd"),
    keywords=("LoRA", "peft", "singular values", "SVD", "PiSSA", "fine-tuning", "few parameters"),
)

CLAIMS: tuple[Claim, ...] = ()
