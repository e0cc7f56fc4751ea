"""Parameter Efficient Fine-tuning via Explained Variance Adaptation (arXiv 2410.07170)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=14,
    slug="eva",
    title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    authors=(
        "Fabian Paischer",
        "Lukas Hauzenberger",
        "Thomas Schmied",
        "Benedikt Alkin",
        "Marc Peter Deisenroth",
        "Sepp Hochreiter",
    ),
    author_count=6,
    date="2024-10-09",
    arxiv="2410.07170",
    venue="NeurIPS 2025",
    code=("ml-jku/EVA", "BenediktAlkin/vtab1k-pytorch"),
    summary=(
        "EVA starts LoRA from data. Before training, mini-batches of the downstream data pass through the "
        "frozen model, and for the input of every adapted layer a principal-component basis is built "
        "incrementally until it stops turning. The down-projection starts as the leading components and "
        "the up-projection at zero, so the function is unchanged but the first gradients see the "
        "directions of largest variance. Ranks are then redistributed over the layers so that a fixed "
        "budget explains the most variance; training itself is plain LoRA. Faster convergence and the "
        "best average over language, vision and reinforcement learning are claimed, at a small cost of "
        "initialisation, and later versions prove that the choice maximises the expected gradient. The "
        "components have unit norm, which is a larger first gradient than LoRA's usual start by a factor "
        "of √3, so a random orthonormal start and a tuned learning rate for each arm are the baselines "
        "that isolate the effect of the data. The first versions were titled One Initialization to Rule "
        "them All."
    ),
    room="adapters",
    parts=("adapters.eva_init_", "adapters.ActivationPCA", "adapters.allocate_ranks"),
    keywords=(
        "PEFT",
        "LoRA",
        "initialization",
        "PCA",
        "incremental SVD",
        "rank allocation",
        "One Initialization to Rule them All",
        "fine-tuning",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
