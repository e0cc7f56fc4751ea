"""PyTorch's own initialisers, drawn from a generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_by(generator: torch.Generator) -> Iterator[None]:
    """Seed the global CPU generator from `generator` inside the block, and restore it afterwards.

    Layers draw their default weights from the global generator; this makes them depend on
    `generator` alone.

    Example:
        >>> with seeded_by(torch.Generator().manual_seed(0)):
        ...     a = torch.nn.Linear(2, 2).weight
        >>> with seeded_by(torch.Generator().manual_seed(0)):
        ...     b = torch.nn.Linear(2, 2).weight
        >>> torch.equal(a, b)
        True
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
