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
    from weightlab.nn.orthogonality_penalty import Deviation, OrthogonalityPenalty, find_weights
    from weightlab.nn.relaxed_orthogonality import RelaxedOrthogonal, relaxed_orthogonal

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "Deviation": ".orthogonality_penalty",
        "GhostBatchNorm": ".ghost_batch_norm",
        "GhostBatchNorm1d": ".ghost_batch_norm",
        "GhostBatchNorm2d": ".ghost_batch_norm",
        "GhostBatchNorm3d": ".ghost_batch_norm",
        "OrthogonalityPenalty": ".orthogonality_penalty",
        "RelaxedOrthogonal": ".relaxed_orthogonality",
        "find_weights": ".orthogonality_penalty",
        "relaxed_orthogonal": ".relaxed_orthogonality",
    },
)
