"""Character-level language modelling with a small GPT, on any text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.exceptions import TaskError
from weightlab.tasks.base import Split, Task
from weightlab.tasks.data.alphabet import ALPHABET_SIZE
from weightlab.tasks.digest import code_digest, digest
from weightlab.tasks.models.gpt import GPT, GPTConfig

EVALUATION_WINDOWS = 32


class TextGPT(Task):
    """Predict the next character. Subclasses say where the text is from.

    A batch is an int64 tensor `[batch_size, context + 1]` of windows at uniformly random places of
    the split's text: inputs are all but the last column, targets all but the first. The metric
    `loss` is cross-entropy in nats a character, over windows spread evenly over the split.

    Args:
        width: Width of the GPT.
        depth: Its blocks.
        heads: Its attention heads.
        context: Characters it sees at most.
        dropout: Its dropout.
        tied: Whether its head shares the embedding's weight.
        batch_size: Windows in a batch.
        steps: Default training steps.
        eval_characters: Characters predicted in one evaluation, at most the split's.
    """

    metric = "loss"
    mode: Literal["min", "max"] = "min"

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int = 4,
        context: int = 64,
        dropout: float = 0.0,
        tied: bool = False,
        batch_size: int = 16,
        steps: int,
        eval_characters: int = 16_384,
    ) -> None:
        self.config = GPTConfig(ALPHABET_SIZE, context, width, depth, heads, dropout, tied)
        self.batch_size = batch_size
        self.steps = steps
        self.eval_characters = eval_characters

    @abstractmethod
    def text(self, split: Split) -> Tensor:
        """Return a split's text as uint8 symbols `[characters]`; must be quick from the second call on."""

    def build(self, generator: torch.Generator) -> GPT:
        """Return a GPT with weights drawn from `generator`."""
        return GPT(self.config, generator)

    def batches(self, split: Split, generator: torch.Generator) -> Iterator[Tensor]:
        """Yield random windows without end."""
        text, length = self._text(split), self.config.context + 1
        offsets = torch.arange(length)
        while True:
            starts = torch.randint(len(text) - length + 1, (self.batch_size, 1), generator=generator)
            yield text[starts + offsets].long()

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats a character."""
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return `loss`, nats a character, over the same windows every time."""
        text, context = self._text(split), self.config.context
        count = max(1, min(self.eval_characters, len(text) - 1) // context)
        starts = torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64).long()
        windows = text[starts[:, None] + torch.arange(context + 1)]
        device = next(model.parameters()).device
        total = torch.zeros((), dtype=torch.float64)
        for batch in windows.split(EVALUATION_WINDOWS):
            total += self.loss(model, batch.long().to(device)).double().cpu() * len(batch)
        return {"loss": total.item() / count}

    def fingerprint(self) -> str:
        """Hash of the three splits' text, of the task's settings and of its code."""
        splits: tuple[Split, ...] = ("train", "validation", "test")
        return digest(
            code_digest(), self.config, self.eval_characters, *(self._text_digest(split) for split in splits)
        )

    def _text_digest(self, split: Split) -> str:
        return digest(self._text(split))

    def _text(self, split: Split) -> Tensor:
        text = self.text(split)
        if len(text) <= self.config.context:
            raise TaskError(
                f"{self.name}: the {split} text has {len(text)} characters, too few for context {self.config.context}"
            )
        return text
