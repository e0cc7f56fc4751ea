"""Reading a data set by index, and training a model on it in an order that depends on a seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from weightlab.exceptions import WeightlabError
from weightlab.inspect.example_scores import check_targets

Data = Dataset[Any] | tuple[Tensor, Tensor]
Augment = Callable[[Any, torch.Generator], Any]
Watch = Callable[[Tensor, Tensor, Tensor], object]

CHECKED = 8
_LOOK_EVERY = 50


class ExampleReader:
    """Batches of a data set by index.

    Args:
        data: A pair of tensors, inputs `(N, ...)` and classes `(N,)`; or a map-style data set of such pairs.
        workers: Processes that load a data set's examples.

    Raises:
        TypeError: If `data` is neither.
        ValueError: If it is empty, or the two tensors are not equally long.
    """

    def __init__(self, data: Data, workers: int = 0) -> None:
        if isinstance(data, TensorDataset) and len(data.tensors) == 2:
            data = (data.tensors[0], data.tensors[1])
        self.tensors: tuple[Tensor, Tensor] | None = None
        if isinstance(data, tuple):
            if len(data) != 2 or not all(isinstance(part, Tensor) and part.ndim for part in data):
                raise TypeError("dataset must be a data set, or a pair of tensors (inputs, targets)")
            if len(data[0]) != len(data[1]):
                raise ValueError(f"dataset has {len(data[0])} inputs and {len(data[1])} targets")
            self.tensors = data
            self.count = len(data[0])
        elif isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise TypeError(
                f"dataset must be a pair of tensors, or have __len__ and __getitem__, got {type(data).__name__}: "
                "scores are kept by index"
            )
        else:
            self.count = len(data)  # type: ignore[arg-type]
        if self.count == 0:
            raise ValueError("dataset has no examples")
        self.dataset = data
        self.workers = workers

    def batches(self, order: Iterable[Tensor], seed: int = 0) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Yield indices, inputs and targets of the batches whose indices `order` gives."""
        if self.tensors is not None:
            inputs, targets = self.tensors
            for indices in order:
                yield indices, inputs[indices.to(inputs.device)], targets[indices.to(targets.device)]
            return
        kept = list(order)
        generator = torch.Generator().manual_seed(seed)
        sampler = [indices.tolist() for indices in kept]
        loader = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=self.workers,
            generator=generator,
        )
        for indices, batch in zip(kept, loader, strict=True):
            if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor):
                raise TypeError("each example of the dataset must be a pair (input, label)")
            yield indices, batch[0], batch[1]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Yield all examples in the data set's order."""
        return self.batches(torch.arange(self.count).split(batch_size))

    def check_same_twice(self) -> None:
        """Read some examples twice.

        Raises:
            ValueError: If they differ.
        """
        if self.tensors is not None:
            return
        for index in np.linspace(0, self.count - 1, min(CHECKED, self.count)).astype(int).tolist():
            first, second = (default_collate([self.dataset[index]]) for _ in range(2))  # type: ignore[index]
            if not _same(first, second):
                raise ValueError(
                    f"dataset gives example {index} differently each time; scores need a view without random "
                    "augmentation: give that as dataset, and the random one as training_view"
                )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors, also those in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(part, device) for part in value)
    return value


def derived_seed(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on all the numbers.

    Example:
        >>> derived_seed(0, 1) != derived_seed(1, 0)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators inside the block, and restore them afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def steps_in(examples: int, batch_size: int) -> int:
    """Return the number of batches of an epoch."""
    return math.ceil(examples / batch_size)


def random_batches(
    indices: Tensor, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `steps` batches, epoch after epoch in a new order.

    An epoch is parted into batches of nearly equal size, at most `batch_size`: no example is left out of it, and there
    is no batch of one that batch normalisation would choke on.
    """
    while steps > 0:
        order = indices[torch.randperm(len(indices), generator=generator)]
        batches = order.tensor_split(steps_in(len(indices), batch_size))[:steps]
        yield from batches
        steps -= len(batches)


def sgd(model: nn.Module, lr: float) -> Optimizer:
    """Return the official code's optimizer: Nesterov momentum 0.9 and weight decay 5e-4."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def train(
    model: nn.Module,
    reader: ExampleReader,
    optimizer: Optimizer,
    *,
    indices: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    augment: Augment | None = None,
    anneal: bool = False,
    watch: Sequence[Watch] = (),
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Train by cross-entropy on some examples of a data set.

    Args:
        model: On `device`; is left in training mode.
        reader: The examples.
        optimizer: Of the model's parameters.
        indices: Which of the examples, int64.
        steps: Optimizer steps.
        batch_size: Examples in a batch, at most.
        seed: Of order, augmentation and the model's own randomness.
        device: Where to compute.
        augment: Changes inputs at random, drawing from the generator that it gets.
        anneal: Whether the learning rate falls to 0 along a cosine.
        watch: Called with indices, logits and targets of each batch, before the step.
        tick: Called after each step.

    Raises:
        TypeError: If the targets are no integers.
        ValueError: If a target is out of range.
        WeightlabError: If the loss stops being finite.
    """
    order, changes = (torch.Generator().manual_seed(derived_seed(seed, part)) for part in (1, 2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if anneal and steps else None
    finite = torch.ones((), dtype=torch.bool, device=device)
    model.train()
    with seeded(derived_seed(seed, 3), device):
        batches = random_batches(indices, batch_size, steps, order)
        for step, (chosen, inputs, targets) in enumerate(reader.batches(batches, derived_seed(seed, 4)), 1):
            if augment is not None:
                inputs = augment(inputs, changes)
            logits = model(to_device(inputs, device))
            targets = check_targets(logits, targets).to(device)
            for look in watch:
                look(chosen, logits.detach(), targets)
            loss = F.cross_entropy(logits, targets)
            finite &= torch.isfinite(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            tick()
            if (step % _LOOK_EVERY == 0 or step == steps) and not bool(finite):
                raise WeightlabError(
                    f"the loss was not finite within {step} steps; lower the learning rate "
                    f"(now {optimizer.param_groups[0]['lr']:g}), or look for such values in the inputs"
                )
