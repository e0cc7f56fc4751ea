"""ARO: A New Lens On Matrix Optimization For Large Models (arXiv 2602.09006)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=36,
    slug="aro",
    title="ARO: A New Lens On Matrix Optimization For Large Models",
    authors=("Gong", "Zazo", "Luo", "Wang", "Hensman", "Ma"),
    author_count=6,
    date="2026-02-09",
    arxiv="2602.09006",
    summary=(
        "Several matrix optimizers can be read as: rotate the gradient into some basis, apply a simple "
        "rule there, rotate back. ARO makes the rotation a free choice that depends on the rule, aimed at "
        "the fastest decrease of the loss under that rule, and updates it with one QR decomposition per "
        "matrix and step. With alternating row and column normalisation (Sinkhorn) as its rule it is "
        "reported to reach a loss with 1.3 to 1.35 times fewer tokens than AdamW and 1.1 to 1.15 times "
        "fewer than orthogonalisation, for models of up to 8 billion active parameters. That QR maximises "
        "the rate of decrease is doubtful: the exact solution of the alignment step is the polar factor, "
        "and the QR policy drifts towards the eigenbasis and can lower the objective; the paper prefers "
        "it for its robustness to noise. Details of the method are known from independent transcriptions, "
        "which differ in the Sinkhorn step, and no official code is known."
    ),
    room="optim",
    parts=("optim.ARO",),
    keywords=(
        "optimizer",
        "rotation",
        "Sinkhorn",
        "SOAP",
        "Muon",
        "QR",
        "matrix optimisation",
        "pre-training",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
