"""Layers, parametrizations and penalties."""

from typing import TYPE_CHECKING

from weightlab._lazy import exports

if TYPE_CHECKING:
    from weightlab.nn.ghost_batch_norm import (
        GhostBatchNorm,
        GhostBatchNorm1d,
        GhostBatchNorm2d,
        GhostBatchNorm3d,
    )

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "GhostBatchNorm": ".ghost_batch_norm",
        "GhostBatchNorm1d": ".ghost_batch_norm",
        "GhostBatchNorm2d": ".ghost_batch_norm",
        "GhostBatchNorm3d": ".ghost_batch_norm",
    },
)
