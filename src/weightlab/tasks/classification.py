"""Classification of images held in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.tasks.base import Split, Task

EVALUATION_BATCH = 250


class Classification(Task):
    """Cross-entropy on images and classes. Subclasses say where they are from.

    A batch is a pair `(pixels, labels)`: pixels as stored (uint8) after `augment`, labels int64. Pixels
    become floats on the model's device, in `prepare`. Training goes over the split in random order, in
    full batches only. The metric `error` is the fraction classified wrongly; `loss` is the mean
    cross-entropy in nats.
    """

    metric = "error"
    mode: Literal["min", "max"] = "min"

    @abstractmethod
    def images(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return a split's pixels `[n, ...]` and labels `[n]`; must be quick from the second call on."""

    @abstractmethod
    def prepare(self, pixels: Tensor) -> Tensor:
        """Turn stored pixels into the model's float input, on their device."""

    def augment(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return training pixels changed at random, drawing from `generator` only; here unchanged."""
        return pixels

    def evaluated(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return the pixels and labels that `evaluate` goes over; here the whole split."""
        return self.images(split)

    def batches(self, split: Split, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one epoch; batches are full, so up to `batch_size - 1` images wait for the next one."""
        pixels, labels = self.images(split)
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            index = order[start : start + self.batch_size]
            yield self.augment(pixels[index], generator), labels[index]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy in nats."""
        pixels, labels = batch
        return F.cross_entropy(model(self.prepare(pixels)), labels)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Return `error` (fraction) and `loss` (nats) over the split, in order."""
        pixels, labels = self.evaluated(split)
        device = next(model.parameters()).device
        wrong, total = 0, 0.0
        for x, y in zip(pixels.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            y = y.to(device)
            logits = model(self.prepare(x.to(device)))
            wrong += int((logits.argmax(-1) != y).sum())
            total += float(F.cross_entropy(logits, y, reduction="sum"))
        return {"error": wrong / len(labels), "loss": total / len(labels)}
