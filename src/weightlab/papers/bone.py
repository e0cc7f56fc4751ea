"""Bone (arXiv 2409.15371)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=6,
    slug="bone",
    title=(
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large "
        "Language Models"
    ),
    authors=("Jiale Kang",),
    author_count=1,
    date="2024-09-19",
    arxiv="2409.15371",
    venue="ICLR 2026",
    code=("JL-er/Bone", "Joluck/MiSS"),
    summary=(
        "Bone fine-tunes a frozen linear layer with one trainable tensor that starts at zero. The weight "
        "is cut into square blocks, the blocks of one row share one trainable block B, and each block W "
        "is updated by WB + B, so that the frozen weight itself steers the update at every step; no SVD, "
        "no random factors and no scale are needed. With Llama-2-7B on mathematics the first versions "
        "report 49.4 on GSM8K and 8.9 on MATH, ahead of LoRA and PiSSA at a similar number of parameters. "
        "Later versions drop the product with W for speed and became DiSHA and then MiSS, under which "
        "name the additive form now lives in Hugging Face PEFT; this entry follows the block-affine form "
        "of the first versions. Such comparisons hang on the learning rate: a larger first gradient alone "
        "wins at a rate shared by all methods. An update can also be ahead early and behind at the end, "
        "so both halves of training are to be reported."
    ),
    room="adapters",
    parts=("adapters.BoneConfig", "adapters.bone_weight", "adapters.bone_linear"),
    keywords=(
        "PEFT",
        "fine-tuning",
        "LoRA",
        "DiSHA",
        "MiSS",
        "Bat",
        "block affine",
        "weight guide",
        "shard sharing",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
