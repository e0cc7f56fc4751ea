"""Models trained on one task, to be adapted to another."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.tasks.base import Task
from weightlab.tasks.data.cache import TensorCache
from weightlab.tasks.digest import code_digest, digest
from weightlab.tasks.models.seeding import seeded_by


def pretrained(source: Task, generator: torch.Generator, *, steps: int, lr: float = 3e-3) -> nn.Module:
    """Build the model of `source` and train it there, on the CPU: the start of an adaptation.

    AdamW, betas (0.9, 0.95), weight decay 0.01, on the training split; the learning rate falls linearly
    to zero. Initial weights and the order of the data are drawn from `generator` alone, of which one
    number is used up, so that seed k always gives pre-trained model k.

    Trained weights are kept under `cache_folder()`, under everything that they depend on: the
    source's settings, data and code, the number drawn, steps, learning rate, the number of CPU threads,
    the kind of CPU, and PyTorch's version. All arms of one seed read the same file.

    Args:
        source: The task to train on.
        generator: Source of the seed.
        steps: Training steps.
        lr: Learning rate of the first step.

    Returns:
        The model in training mode, all parameters trainable.

    Raises:
        TaskError: When the source's data are missing.

    Example:
        >>> from weightlab.tasks import DigitsMLP
        >>> task = DigitsMLP()
        >>> a, b = (pretrained(task, torch.Generator().manual_seed(0), steps=5) for _ in range(2))
        >>> all(map(torch.equal, a.parameters(), b.parameters()))
        True
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    key = digest(
        code_digest(),
        source.fingerprint(),
        source.batch_size,
        seed,
        steps,
        lr,
        torch.get_num_threads(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
    )
    cache = TensorCache(f"pretrained--{source.name}--{key[:16]}", (), lambda: _train(source, seed, steps, lr))
    with torch.random.fork_rng(devices=[]):  # making layers draws from the global generator
        model = source.build(torch.Generator().manual_seed(seed))
        model.load_state_dict(cache.tensors())
    return model


def _train(source: Task, seed: int, steps: int, lr: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = source.build(generator)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
    with seeded_by(generator), torch.enable_grad():  # dropout draws from the global generator
        for step, batch in enumerate(islice(_endless(source, generator), steps)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            source.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    # Cloned, because a file cannot hold tensors that share memory, as tied weights do.
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _endless(task: Task, generator: torch.Generator) -> Iterator[Any]:
    while True:
        yield from task.batches("train", generator)
