"""On the Initialization of Graph Neural Networks (arXiv 2312.02622)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=16,
    slug="virgo",
    title="On the Initialization of Graph Neural Networks",
    authors=("Jiahang Li", "Yakun Song", "Xiang Song", "David Wipf"),
    author_count=4,
    date="2023-12-05",
    arxiv="2312.02622",
    venue="ICML 2023",
    code=("LspongebobJH/virgo_icml2023",),
    summary=(
        "Glorot and Kaiming variances assume a layer without a graph. In a message-passing layer the "
        "graph operator scales the signal as well, and differently at every depth. Virgo derives the "
        "variance of activations and of gradients along propagation paths, asks consecutive layers to "
        "have equal variance, and solves for the variance of each weight with a few sparse products; it "
        "needs the graph and, for the forward rule, the features. Better or equal accuracy than the usual "
        "starts is claimed on fifteen data sets with three architectures, with steadier variances at the "
        "start. Stability is expected to improve clearly against Glorot and for sum aggregation, and "
        "hardly against Kaiming for symmetric normalisation. At depth two nothing differs, and single "
        "draws of deep networks are heavy-tailed, so medians over many draws decide."
    ),
    room="init",
    parts=("init.virgo_", "init.virgo_variances"),
    keywords=(
        "Virgo",
        "GNN",
        "GCN",
        "GraphSAGE",
        "GIN",
        "message passing",
        "variance",
        "PyTorch Geometric",
        "Glorot",
        "Kaiming",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
