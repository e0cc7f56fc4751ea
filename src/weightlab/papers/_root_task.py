"""The digits judged by their training loss, for claims about optimisation."""

from __future__ import annotations

from torch import nn

from weightlab.tasks.base import Split
from weightlab.tasks.digits_mlp import DigitsMLP


class DigitsTrainingLoss(DigitsMLP):
    """`digits-mlp` scored, in tuning and in the report, by the loss on the images it is trained on."""

    name = "digits-mlp, training loss"
    metric = "loss"
    description = "perceptron on scikit-learn's 8x8 digits, scored by its training loss"

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return `error` and `loss` on the training images, whatever split is asked for."""
        return super().evaluate(model, "train")
