"""Continual Learning with Dynamic Sparse Training (arXiv 2308.14831)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=31,
    slug="continual-dst",
    title=(
        "Continual Learning with Dynamic Sparse Training: Exploring Algorithms for Effective Model Updates"
    ),
    author_count=5,
    date="2023-08",
    arxiv="2308.14831",
    venue="CPAL 2024",
    code=("muratonuryildirim/CL-with-DST",),
    summary=(
        "Each task of a sequence trains a sparse sub-network of one shared backbone; weights of finished "
        "tasks are frozen and may be used, not changed, by later ones. The sub-network is found by "
        "dynamic sparse training, which starts from a random mask and from time to time drops the weakest "
        "connections and grows others. The paper proposes no new algorithm but compares the ingredients: "
        "how density is spread over layers, how connections are grown, how sparse the network is, and "
        "whether to switch strategies between tasks. It finds the Erdos-Renyi-kernel spread better at "
        "moderate sparsity and the uniform one more reliable at high sparsity, with no growth rule best "
        "everywhere. The official code has defects that touch the comparison: with SGD its momentum "
        "growth sees only zeros, frozen weights that are regrown train as zero but are evaluated with "
        "their stored values, and test images pass through random augmentation."
    ),
    room="compress",
    parts=("compress.erdos_renyi_kernel", "compress.DynamicSparse", "compress.TaskIsolation"),
    keywords=(
        "sparse training",
        "RigL",
        "SET",
        "continual learning",
        "masks",
        "ERK",
        "parameter isolation",
        "forgetting",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
