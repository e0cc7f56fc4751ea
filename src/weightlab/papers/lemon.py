"""LeMON: Learning to Learn Multi-Operator Networks (arXiv 2408.16168)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=40,
    slug="lemon",
    title="LeMON: Learning to Learn Multi-Operator Networks",
    authors=("Sun", "Zhang", "Schaeffer"),
    author_count=3,
    date="2024-08-28",
    arxiv="2408.16168",
    code=("JingminSun/LeMON_PROSE", "JingminSun/LeMON"),
    summary=(
        "One network learns the solution operators of many families of partial differential equations, "
        "from initial data and a symbolic encoding of the equation. It is pre-trained on several families "
        "and adapted to an unseen one from 20 to 100 examples, by fine-tuning, by LoRA, or after meta- "
        "learning across families; version 2 lets the encoder put out the inner learning rate. Claimed "
        "are gains that grow with the number of families, lower error than single-operator networks "
        "trained on the same samples, and some zero-shot transfer. The gain depends on how near the "
        "unseen families are to those seen and on the operator encoding, and mild negative transfer is to "
        "be expected elsewhere. The official data code integrates an equation other than Cahn-Hilliard "
        "under that name, and some equation strings carry wrong signs; its meta-learning optimizer adds "
        "weight decay with the wrong sign."
    ),
    room="train",
    parts=("train.operators",),
    keywords=(
        "PDE",
        "operator learning",
        "FNO",
        "DeepONet",
        "meta-learning",
        "MAML",
        "LoRA",
        "zero-shot",
        "fine-tuning",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
