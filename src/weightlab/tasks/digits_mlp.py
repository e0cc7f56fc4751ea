"""`digits-mlp`: a small perceptron on scikit-learn's embedded digits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from weightlab._lazy import require
from weightlab.tasks.base import Split
from weightlab.tasks.classification import Classification
from weightlab.tasks.digest import code_digest, digest
from weightlab.tasks.models.mlp import MLP
from weightlab.tasks.models.seeding import seeded_by


@functools.cache
def digits() -> dict[Split, tuple[Tensor, Tensor]]:
    """Return the 1,797 digits (uint8 `[n, 8, 8]`, values 0 to 16) by split.

    Of each class, in the data set's order, the fourth of every five images is for validation, the
    fifth for test: 1,085 / 357 / 355 images with the same mix of classes.
    """
    data = require("sklearn.datasets", "trial").load_digits()
    pixels = torch.from_numpy(data.images).to(torch.uint8)
    labels = torch.from_numpy(data.target).long()
    rank = torch.zeros_like(labels)
    for label in range(10):
        chosen = labels == label
        rank[chosen] = torch.arange(int(chosen.sum())) % 5
    masks: dict[Split, Tensor] = {"train": rank < 3, "validation": rank == 3, "test": rank == 4}
    return {split: (pixels[mask], labels[mask]) for split, mask in masks.items()}


class DigitsMLP(Classification):
    """8x8 digits with one hidden layer of 64: seconds on any machine, no download.

    Args:
        hidden: Sizes of the hidden layers.
        batch_size: Images in a batch.
        steps: Default training steps.
    """

    name = "digits-mlp"
    minimal_effect = 0.01
    description = "perceptron on scikit-learn's 8x8 digits (embedded)"

    def __init__(self, *, hidden: Sequence[int] = (64,), batch_size: int = 32, steps: int = 200) -> None:
        self.hidden = tuple(hidden)
        self.batch_size = batch_size
        self.steps = steps

    def build(self, generator: torch.Generator) -> MLP:
        """Return a perceptron with PyTorch's default weights, drawn from `generator`."""
        with seeded_by(generator):
            return MLP([64, *self.hidden, 10])

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the split's digits."""
        return digits()[split]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Scale to [0, 1]."""
        return pixels.float() / 16.0

    def fingerprint(self) -> str:
        """Hash of all digits, of the task's settings and of its code."""
        return digest(code_digest(), self.hidden, *(part for split in digits().values() for part in split))
