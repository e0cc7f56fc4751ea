"""`shakespeare-gpt`: a character GPT on Tiny Shakespeare."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weightlab.tasks.base import Split
from weightlab.tasks.data.text import load_text
from weightlab.tasks.text_gpt import TextGPT


class ShakespeareGPT(TextGPT):
    """Character GPT on Tiny Shakespeare (1.1 million characters), with the data set's own splits.

    Args:
        width: Width of the GPT.
        depth: Its blocks.
        batch_size: Windows in a batch.
        steps: Default training steps.
        **options: Further arguments of `TextGPT`.
    """

    name = "shakespeare-gpt"
    minimal_effect = 0.02
    description = "character GPT on Tiny Shakespeare (karpathy/tiny_shakespeare)"

    def __init__(
        self, *, width: int = 96, depth: int = 3, batch_size: int = 32, steps: int = 500, **options: Any
    ) -> None:
        super().__init__(width=width, depth=depth, batch_size=batch_size, steps=steps, **options)

    def text(self, split: Split) -> Tensor:
        """Return the split's symbols."""
        return load_text("karpathy/tiny_shakespeare", split)
