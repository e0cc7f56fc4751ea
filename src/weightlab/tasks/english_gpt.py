"""`english-gpt`: a character GPT on technical prose."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weightlab.tasks.base import Split
from weightlab.tasks.data.text import load_text
from weightlab.tasks.text_gpt import TextGPT


class EnglishGPT(TextGPT):
    """Character GPT on technical proposals in English (23.5 million characters), split by document.

    The text is read from `$WEIGHTLAB_DATA/technical-english/{train,validation,test}-*.parquet`, a
    column `text` with a document a row; the Hub does not have it.

    Args:
        width: Width of the GPT.
        depth: Its blocks.
        context: Characters it sees at most.
        batch_size: Windows in a batch.
        steps: Default training steps.
        eval_characters: Characters predicted in one evaluation.
        **options: Further arguments of `TextGPT`.
    """

    name = "english-gpt"
    minimal_effect = 0.02
    description = "character GPT on technical proposals in English (technical-english, local only)"

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 4,
        context: int = 128,
        batch_size: int = 32,
        steps: int = 1000,
        eval_characters: int = 65_536,
        **options: Any,
    ) -> None:
        super().__init__(
            width=width,
            depth=depth,
            context=context,
            batch_size=batch_size,
            steps=steps,
            eval_characters=eval_characters,
            **options,
        )

    def text(self, split: Split) -> Tensor:
        """Return the split's symbols."""
        return load_text("technical-english", split, on_hub=False)
