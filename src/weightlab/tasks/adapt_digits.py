"""`adapt-digits`: a perceptron that knows the digits, to be adapted to shifted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from weightlab.exceptions import UsageError
from weightlab.tasks.base import Split
from weightlab.tasks.classification import Classification
from weightlab.tasks.digest import digest
from weightlab.tasks.digits_mlp import DigitsMLP, digits
from weightlab.tasks.pretraining import pretrained

SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotate": lambda x: x.rot90(1, (1, 2)),
    "contrast": lambda x: 0.25 + 0.5 * x,
}
"""Name -> change to images `[n, 8, 8]` with values from 0 to 1."""


class AdaptDigits(Classification):
    """Digits changed by a fixed rule, for a perceptron trained on them as they are.

    `build` trains a perceptron 64-256-256-10 on the training split of `digits-mlp` and returns it; the
    images to adapt to are the same ones, shifted. Splits are those of `digits-mlp`. Besides `error` and
    `loss`, `evaluate` gives `source_error`, the error on the split's images as they were: what
    adapting has made the model forget.

    Args:
        shift: `"rotate"`, a quarter turn, which leaves little of what was learned in the first layer;
            or `"contrast"`, grey digits on a grey ground, which rescaling could mend.
        hidden: Sizes of the hidden layers.
        batch_size: Images in a batch, also of pre-training.
        steps: Default training steps.
        pretrain_steps: Steps of pre-training.

    Raises:
        UsageError: When there is no such shift.
    """

    name = "adapt-digits"
    minimal_effect = 0.01
    description = "perceptron trained on scikit-learn's 8x8 digits, adapted to digits turned by 90 degrees"

    def __init__(
        self,
        *,
        shift: str = "rotate",
        hidden: Sequence[int] = (256, 256),
        batch_size: int = 64,
        steps: int = 400,
        pretrain_steps: int = 300,
    ) -> None:
        if shift not in SHIFTS:
            raise UsageError(f"shift must be {' or '.join(SHIFTS)}, not {shift!r}")
        self.shift = shift
        self.source = DigitsMLP(hidden=hidden, batch_size=batch_size)
        self.batch_size = batch_size
        self.steps = steps
        self.pretrain_steps = pretrain_steps

    def build(self, generator: torch.Generator) -> nn.Module:
        """Return the pre-trained perceptron that `generator` stands for."""
        return pretrained(self.source, generator, steps=self.pretrain_steps)

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the split's digits, not yet shifted."""
        return digits()[split]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Scale to [0, 1], then shift."""
        return SHIFTS[self.shift](self.source.prepare(pixels))

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return `error` (fraction) and `loss` (nats) on shifted images, `source_error` on others."""
        source_error = self.source.evaluate(model, split)["error"]
        return {**super().evaluate(model, split), "source_error": source_error}

    def fingerprint(self) -> str:
        """Hash of all digits, of the task's settings and of its code."""
        return digest(self.source.fingerprint(), self.shift, self.batch_size, self.pretrain_steps)


class AdaptDigitsContrast(AdaptDigits):
    """`AdaptDigits` with the mild shift, under a name of its own."""

    name = "adapt-digits-contrast"
    description = "perceptron trained on scikit-learn's 8x8 digits, adapted to digits of low contrast"

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (256, 256),
        batch_size: int = 64,
        steps: int = 400,
        pretrain_steps: int = 300,
    ) -> None:
        super().__init__(
            shift="contrast", hidden=hidden, batch_size=batch_size, steps=steps, pretrain_steps=pretrain_steps
        )
