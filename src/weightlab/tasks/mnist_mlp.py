"""`mnist-mlp`: a perceptron on MNIST."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightlab.tasks.base import Split
from weightlab.tasks.classification import Classification
from weightlab.tasks.data.images import images_fingerprint, load_images
from weightlab.tasks.digest import code_digest, digest
from weightlab.tasks.models.mlp import MLP
from weightlab.tasks.models.seeding import seeded_by

VALIDATION_IMAGES = 5000


class MnistMLP(Classification):
    """MNIST's 28x28 digits with one hidden layer of 128.

    Training images but the last 5,000 are trained on, those are for validation; test is the data
    set's own.

    Args:
        hidden: Sizes of the hidden layers.
        batch_size: Images in a batch.
        steps: Default training steps.
    """

    name = "mnist-mlp"
    minimal_effect = 0.002
    description = "perceptron on MNIST (ylecun/mnist)"

    def __init__(self, *, hidden: Sequence[int] = (128,), batch_size: int = 128, steps: int = 500) -> None:
        self.hidden = tuple(hidden)
        self.batch_size = batch_size
        self.steps = steps

    def build(self, generator: torch.Generator) -> MLP:
        """Return a perceptron with PyTorch's default weights, drawn from `generator`."""
        with seeded_by(generator):
            return MLP([784, *self.hidden, 10])

    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the split's digits, uint8 `[n, 1, 28, 28]`."""
        pixels, labels = load_images("ylecun/mnist", "mnist", "test" if split == "test" else "train")
        if split == "train":
            return pixels[:-VALIDATION_IMAGES], labels[:-VALIDATION_IMAGES]
        if split == "validation":
            return pixels[-VALIDATION_IMAGES:], labels[-VALIDATION_IMAGES:]
        return pixels, labels

    def prepare(self, pixels: Tensor) -> Tensor:
        """Scale to mean 0 and standard deviation 1 over the training images."""
        return (pixels.float() / 255.0 - 0.1307) / 0.3081

    def fingerprint(self) -> str:
        """Hash of all digits, of the task's settings and of its code."""
        return digest(
            code_digest(),
            self.hidden,
            *(images_fingerprint("ylecun/mnist", "mnist", split) for split in ("train", "test")),
        )
