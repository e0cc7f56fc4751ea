"""Spectral Bottleneck in Deep Neural Networks: Noise is All You Need (arXiv 2509.09719)."""

from weightlab.papers.schema import Claim, Paper

PAPER = Paper(
    number=2,
    slug="winner",
    title="Spectral Bottleneck in Deep Neural Networks: Noise is All You Need",
    authors=("Hemanth Chandravamsi", "Dhanush V. Shenoy", "Itay Zinn", "Shimon Pisnoy", "Steven H. Frankel"),
    author_count=5,
    date="2025-09-09",
    arxiv="2509.09719",
    code=("hemanthgrylls/SIREN-square",),
    summary=(
        "A SIREN, a network with sine activations that maps coordinates to a signal, can get stuck at an "
        "output of zero when the signal has almost no energy at low frequencies: the spectral bottleneck. "
        "WINNER adds Gaussian noise to the initial weights of the first two layers, with scales computed "
        "from the spectral centroid of the target, and changes nothing else. State-of-the-art audio "
        "fitting and gains on images and denoising are claimed, against SIREN, FINER, WIRE, Gaussian and "
        "Fourier-feature networks. The stuck SIREN is easily provoked with band-limited noise, but a "
        "SIREN whose first frequency is tuned is a far stronger baseline than the usual factor of 30, and "
        "noise in the first layer is nearly a random-Fourier-feature layer of the same spread. The scale "
        "rule does not know the length of the signal, and the official code divides by the number of "
        "channels several times over. The second version changes the title's first part to name "
        "sinusoidal representation networks and has six authors."
    ),
    room="init",
    parts=(
        "init.winner_",
        "init.siren_uniform_",
        "nn.Sine",
        "nn.Siren",
        "inspect.spectral_centroid",
        "inspect.empirical_ntk",
    ),
    keywords=(
        "WINNER",
        "SIREN",
        "SIREN square",
        "implicit neural representation",
        "INR",
        "coordinate network",
        "sine activation",
        "audio",
        "initialization",
        "Fourier features",
    ),
)

CLAIMS: tuple[Claim, ...] = ()
