"""The command line: one file a group of verbs.

Nothing here imports torch until a verb needs it, so that `--help` answers at once.
"""

# Verbs appear in `--help` in this order.
from weightlab.cli import trials, papers, adapters, inspecting, data_scores, merging, compat  # isort: skip
from weightlab.cli.common import app
from weightlab.cli.entry import INTERRUPTED, main, run

__all__ = [
    "INTERRUPTED",
    "adapters",
    "app",
    "compat",
    "data_scores",
    "inspecting",
    "main",
    "merging",
    "papers",
    "run",
    "trials",
]
