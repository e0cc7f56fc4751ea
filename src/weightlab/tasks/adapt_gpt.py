"""`adapt-gpt`: a character GPT that knows Shakespeare, to be adapted to technical prose."""

from __future__ import annotations

from torch import Tensor

from weightlab.tasks.adapt_text import AdaptText
from weightlab.tasks.base import Split
from weightlab.tasks.data.text import load_text
from weightlab.tasks.shakespeare_gpt import ShakespeareGPT


class AdaptGPT(AdaptText):
    """Character GPT trained on Tiny Shakespeare, adapted to the text of `english-gpt`.

    Data and splits are those of `shakespeare-gpt` and `english-gpt`, so `$WEIGHTLAB_DATA` must hold the
    latter. Arguments are those of `AdaptText`.
    """

    name = "adapt-gpt"
    minimal_effect = 0.02
    description = "character GPT trained on Tiny Shakespeare, adapted to technical English (local only)"
    source_class = ShakespeareGPT

    def text(self, split: Split) -> Tensor:
        """Return the split's symbols."""
        return load_text("technical-english", split, on_hub=False)
