"""How connectivity structure shapes rich and lazy learning in neural circuits (arXiv 2310.08513)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=1,
    slug="rich-lazy",
    title="How connectivity structure shapes rich and lazy learning in neural circuits",
    authors=(
        "Yuhan Helena Liu",
        "Aristide Baratin",
        "Jonathan Cornford",
        "Stefan Mihalas",
        "Eric Shea-Brown",
        "Guillaume Lajoie",
    ),
    author_count=6,
    date="2023-10-12",
    arxiv="2310.08513",
    venue="ICLR 2024",
    code=("Helena-Yuhan-Liu/BioRNN_RichLazy",),
    summary=(
        "Large initial weights make training lazy: weights and tangent kernel barely move. Small ones "
        "make it rich. The paper keeps the norm of the initial recurrent weight fixed and varies its "
        "effective rank instead, by truncating the singular values of a random matrix and restoring its "
        "Frobenius norm. A two-layer linear theory explains the effect: the tangent kernel of a low-rank "
        "start is anisotropic, so most tasks must change it. Recurrent networks on neuroscience tasks, "
        "with synthetic and with experimentally motivated connectivity, are reported to learn more richly "
        "at lower rank, except when the low-rank subspace is aligned with the task, which can be lazy "
        "again. The comparison is void unless the arms end at equal loss; the alignment of tangent "
        "kernels is the clearest of the measures, and the distance of the weights from their start the "
        "noisiest. The paper does not pin down which form of effective rank it means, so three are "
        "offered."
    ),
    room="init",
    parts=(
        "init.low_rank_",
        "inspect.laziness",
        "inspect.tangent_kernel",
        "inspect.tangent_kernel_alignment",
        "inspect.effective_rank",
    ),
    keywords=(
        "initialization",
        "recurrent network",
        "RNN",
        "neural tangent kernel",
        "NTK",
        "feature learning",
        "representation alignment",
        "neuroscience",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
