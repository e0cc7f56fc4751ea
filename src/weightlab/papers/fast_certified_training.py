"""Fast Certified Robust Training with Short Warmup (arXiv 2103.17268)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=24,
    slug="fast-certified-training",
    title="Fast Certified Robust Training with Short Warmup",
    authors=("Z. Shi", "Y. Wang", "H. Zhang", "J. Yi", "C.-J. Hsieh"),
    author_count=5,
    date="2021-03",
    arxiv="2103.17268",
    venue="NeurIPS 2021",
    code=("shizhouxing/Fast-Certified-Robust-Training",),
    summary=(
        "Training with interval bound propagation minimises the worst-case loss over a box around each "
        "input by pushing an interval through the network. Under usual initialisations the interval's "
        "width grows exponentially with depth and many units die while the radius is raised, so earlier "
        "work needed hundreds of epochs of warm-up. Three changes make a short warm-up enough: an "
        "initialisation that keeps the mean interval width constant from layer to layer, batch "
        "normalisation after every affine layer but the last, and two regularisers during warm-up, one on "
        "the tightness of bounds and one on the balance of active and inactive units. The paper reports "
        "state-of-the-art verified error on CIFAR-10 and TinyImageNet within 70 to 160 epochs. The parts "
        "depend on each other: the initialisation shrinks the signal and needs the normalisation, and the "
        "regularisers need both. The official code picks its best epoch by error on the test set, which a "
        "fair trial must not do."
    ),
    room="certify",
    parts=(
        "init.ibp_normal_",
        "init.ibp_init_",
        "certify.ibp_forward",
        "certify.robust_cross_entropy",
        "certify.verified_error",
        "certify.CertifiedWarmupRegularizer",
        "certify.EpsilonSchedule",
    ),
    keywords=(
        "interval bound propagation",
        "IBP",
        "adversarial robustness",
        "verified error",
        "initialisation",
        "batch normalisation",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
