"""Character models that know one text, to be adapted to another."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn

from weightlab.tasks.base import Split
from weightlab.tasks.digest import digest
from weightlab.tasks.models.gpt import GPT
from weightlab.tasks.pretraining import pretrained
from weightlab.tasks.text_gpt import TextGPT


class AdaptText(TextGPT):
    """A `TextGPT` whose model comes from another one. Subclasses say from which, and give `text`.

    `build` trains the GPT on the training split of `source` and returns it. Besides `loss`, `evaluate`
    gives `source_loss`, nats a character on the source's split: what adapting has made the model
    forget.

    Args:
        width: Width of the GPT.
        depth: Its blocks.
        context: Characters it sees at most.
        batch_size: Windows in a batch, also of pre-training.
        steps: Default training steps.
        pretrain_steps: Steps of pre-training.
        eval_characters: Characters predicted in one evaluation, of either text.
        **options: Further arguments of `TextGPT`.
    """

    source_class: ClassVar[type[TextGPT]]

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 2,
        context: int = 32,
        batch_size: int = 32,
        steps: int = 300,
        pretrain_steps: int = 600,
        eval_characters: int = 8192,
        **options: Any,
    ) -> None:
        shared = {
            "width": width,
            "depth": depth,
            "context": context,
            "batch_size": batch_size,
            "eval_characters": eval_characters,
            **options,
        }
        super().__init__(steps=steps, **shared)
        self.source = self.source_class(steps=pretrain_steps, **shared)

    def build(self, generator: torch.Generator) -> GPT:
        """Return the pre-trained GPT that `generator` stands for."""
        return cast("GPT", pretrained(self.source, generator, steps=self.source.steps))

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return `loss` and `source_loss`, nats a character, over the same windows every time."""
        source_loss = self.source.evaluate(model, split)["loss"]
        return {**super().evaluate(model, split), "source_loss": source_loss}

    def fingerprint(self) -> str:
        """Hash of both texts, of the task's settings and of its code."""
        return digest(super().fingerprint(), self.source.fingerprint(), self.batch_size, self.source.steps)
