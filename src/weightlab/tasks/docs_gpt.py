"""`docs-gpt`: a character GPT on the English text that every Python carries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from weightlab.tasks.base import Split
from weightlab.tasks.data.alphabet import encode
from weightlab.tasks.data.docs import docs_text
from weightlab.tasks.text_gpt import TextGPT

BLOCKS = 50
_SPLIT_OF_BLOCK: dict[int, Split] = {3: "validation", 8: "test"}


@functools.cache
def split_text(split: Split) -> Tensor:
    """Return a split of `docs_text()` as symbols.

    The text is cut into 50 contiguous blocks of equal length; of every ten, the fourth is for
    validation, the ninth for test, the others for training.
    """
    symbols = encode(docs_text())
    blocks = symbols.tensor_split(BLOCKS)
    return torch.cat(
        [block for i, block in enumerate(blocks) if _SPLIT_OF_BLOCK.get(i % 10, "train") == split]
    )


class DocsGPT(TextGPT):
    """Character GPT on Python's language reference (`pydoc_data.topics`), which needs no download.

    Arguments are those of `TextGPT`. By default 117,000 weights and a training run of some seconds
    on one CPU core.
    """

    name = "docs-gpt"
    minimal_effect = 0.02
    description = "character GPT on the English text of Python's language reference (embedded)"

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        context: int = 32,
        dropout: float = 0.0,
        tied: bool = False,
        batch_size: int = 32,
        steps: int = 300,
        eval_characters: int = 16_384,
    ) -> None:
        super().__init__(
            width=width,
            depth=depth,
            heads=heads,
            context=context,
            dropout=dropout,
            tied=tied,
            batch_size=batch_size,
            steps=steps,
            eval_characters=eval_characters,
        )

    def text(self, split: Split) -> Tensor:
        """Return the split's symbols."""
        return split_text(split)
