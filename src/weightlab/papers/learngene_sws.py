"""Exploring Learngene via Stage-wise Weight Sharing (arXiv 2404.16897)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=18,
    slug="learngene-sws",
    title="Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models",
    authors=("Shi-Yu Xia", "Wenxuan Zhu", "Xu Yang", "Xin Geng"),
    author_count=4,
    date="2024-04-25",
    arxiv="2404.16897",
    venue="IJCAI 2024",
    code=("AlphaXia/SWS",),
    summary=(
        "One task is often served by models of several depths, and pre-training each is expensive. "
        "Learngene methods train one small set of layers and expand it into descendants of any depth. "
        "Stage-wise weight sharing trains an auxiliary model of a few stages, in each of which one layer "
        "is applied repeatedly, by distillation from a teacher; every layer thus learns to work when "
        "repeated and knows its place. A descendant copies each stage's layer into the positions of that "
        "stage and is fine-tuned with untied weights. On ImageNet it is reported to beat training from "
        "scratch over many depths at a 6.6 times lower total cost, with some 20 times fewer stored "
        "parameters and about ten times less pre-training than pre-training each size. A short fine- "
        "tuning from scratch is a weak baseline. Against layers picked from an untied model of equal "
        "budget, or one depth trained from scratch at equal total cost, the advantage is far less "
        "certain: the saving comes from serving several depths."
    ),
    room="grow",
    parts=("grow.SharedStages", "grow.stage_schedule", "grow.expand", "grow.learngene_init_"),
    keywords=(
        "SWS",
        "learngene",
        "weight sharing",
        "variable depth",
        "distillation",
        "vision transformer",
        "ViT",
        "initialization",
        "expansion",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
