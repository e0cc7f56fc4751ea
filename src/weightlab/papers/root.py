"""ROOT: Robust Orthogonalized Optimizer for Neural Network Training (arXiv 2511.20626)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=8,
    slug="root",
    title="ROOT: Robust Orthogonalized Optimizer for Neural Network Training",
    authors=("Wei He", "Kai Han", "Hang Zhou", "Hanting Chen", "Zhicheng Liu", "Xinghao Chen", "Yunhe Wang"),
    author_count=7,
    date="2025-11-25",
    arxiv="2511.20626",
    code=("huawei-noah/noah-research",),
    summary=(
        "Muon orthogonalises the momentum with Newton-Schulz steps whose coefficients are the same for "
        "every shape. ROOT calls this fragile in two ways: the precision depends on the shape of the "
        "matrix, and a few outlying entries bend the whole result. It therefore fits the coefficients to "
        "each shape, and soft-thresholds the momentum at a high quantile before orthogonalising; what is "
        "clipped is left out of the update but stays in the buffer. A much smaller orthogonalisation "
        "error is reported, and lower training loss than AdamW and Muon for a one-billion-parameter "
        "transformer. The published figures of the error are more modest in the repository's own plot "
        "than in summaries of the paper. Higher precision need not mean lower loss: Muon's imprecise "
        "steps are not known to hold it back, and without outliers clipping only removes signal. "
        "Robustness can only show where outliers carry a visible share of the Frobenius norm."
    ),
    room="optim",
    parts=("optim.ROOT", "linalg.clip_outliers", "linalg.newton_schulz", "linalg.fit_newton_schulz"),
    keywords=(
        "optimizer",
        "Muon",
        "AdaNewton",
        "orthogonalization",
        "soft thresholding",
        "outliers",
        "matrix sign",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
