"""Examples as small PNG images for a page."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

from weightlab._lazy import require

SIDE = 128


class Pictures:
    """Draws examples that are images.

    Bytes are shown as they are, unless none reaches 128; these and floats are spread from the data's smallest value to
    the largest.

    Args:
        inputs: `(N, H, W)`, `(N, 1, H, W)` or `(N, 3, H, W)`; anything else is no image.

    Attributes:
        drawn: Whether the examples are images.
        shape: Height and width; (0, 0) if they are none.

    Example:
        >>> pictures = Pictures(torch.zeros(2, 8, 8, dtype=torch.uint8))
        >>> pictures.drawn, pictures.url(0)[:22]
        (True, 'data:image/png;base64,')
    """

    def __init__(self, inputs: Tensor) -> None:
        self._inputs = inputs[:, None] if inputs.ndim == 3 else inputs
        self.drawn = self._inputs.ndim == 4 and self._inputs.shape[1] in (1, 3)
        self.shape = (0, 0)
        self._low, self._high = 0.0, 255.0
        if self.drawn:
            self.shape = (self._inputs.shape[2], self._inputs.shape[3])
            low, high = (float(value) for value in torch.aminmax(inputs))
            if inputs.dtype != torch.uint8 or high < 128:
                self._low, self._high = (0.0 if inputs.dtype == torch.uint8 else low), high

    def url(self, index: int) -> str:
        """Return one as a `data:` URL, scaled down to at most 128 pixels a side."""
        images = require("PIL.Image", "trial")
        spread = max(self._high - self._low, 1e-12)
        pixels = ((self._inputs[index].float() - self._low) * (255 / spread)).round().clamp(0, 255).byte()
        pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        image = images.fromarray(pixels.contiguous().numpy())
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
