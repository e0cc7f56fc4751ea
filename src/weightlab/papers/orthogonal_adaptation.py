"""Orthogonal Adaptation for Modular Customization of Diffusion Models (arXiv 2312.02432)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=21,
    slug="orthogonal-adaptation",
    title="Orthogonal Adaptation for Modular Customization of Diffusion Models",
    authors=("Po", "Yang", "Aberman", "Wetzstein"),
    author_count=4,
    date="2023-12-05",
    arxiv="2312.02432",
    venue="CVPR 2024",
    summary=(
        "Adapters that were fine-tuned apart, without sight of one another, are often simply added into "
        "one model, and then disturb each other. Here every adapter freezes its down-projection to a few "
        "columns of one shared random orthogonal basis and trains the up-projection alone, so that "
        "adapters listen to different input directions. Merging is a weighted sum of the deltas: no data, "
        "no optimisation, under a second. On twelve identities merged in threes the paper reports "
        "identity scores that stay where they were, while plain LoRAs added together collapse. What is "
        "guaranteed is that the product of two deltas vanishes for disjoint columns, not that one "
        "adapter's delta vanishes on another's inputs; a frozen random subspace of small rank also "
        "catches little of the input, so the trained half must grow and leak with it. Independent random "
        "draws of columns may overlap, and existing LoRAs cannot be converted. No official code is known."
    ),
    room="adapters",
    parts=(
        "adapters.orthogonal_lora_",
        "adapters.merge_adapters",
        "adapters.crosstalk",
        "adapters.shared_basis",
    ),
    keywords=("LoRA", "merging", "interference", "personalisation", "diffusion", "peft", "orthogonal basis"),
)

CLAIMS: tuple[Claim, ...] = ()
