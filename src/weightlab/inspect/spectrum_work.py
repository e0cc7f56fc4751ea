"""How much work the spectrum of a layer is."""

from __future__ import annotations

import math

from weightlab.inspect.layers import Layer
from weightlab.inspect.spectrum import ConvView

# What a layer costs beside its arithmetic, in operations.
_EACH = 1e7


def layer_work(layer: Layer, conv: ConvView = "slices") -> float:
    """Estimate the operations of a layer's spectrum: `m²·n + (4/3)·m³` a matrix, m the shorter side.

    Example:
        >>> import torch
        >>> layer = Layer("w", "matrix", (300, 600), torch.float32, lambda: torch.ones(300, 600))
        >>> round(layer_work(layer) / 1e6)
        100
    """
    if layer.kind == "delta":
        return _EACH
    positions = math.prod(layer.shape[2:])
    sliced = conv == "slices"
    m, n = sorted((layer.shape[0], layer.shape[1] * (1 if sliced else positions)))
    return _EACH + (positions if sliced else 1) * (m * m * n + 4 / 3 * m**3)
