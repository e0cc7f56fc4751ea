"""weightlab: methods about neural-network weights as PyTorch parts, and fair trials that measure them.

Rooms (`weightlab.optim`, `weightlab.linalg`, ...) are imported on first use, so `import weightlab`
costs next to nothing.
"""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab import adapters, exceptions, inspect, linalg, merge, nn, optim, papers, tasks, train, trial

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = exports(
    __name__,
    dict.fromkeys(
        [
            "adapters",
            "exceptions",
            "inspect",
            "linalg",
            "merge",
            "nn",
            "optim",
            "papers",
            "tasks",
            "train",
            "trial",
        ],
        "",
    ),
)
