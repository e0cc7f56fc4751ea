"""Peak memory of a run, and the exact size of optimizer state."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

MIB = 2**20


class PeakMemory:
    """Peak memory since construction, in MiB.

    On an accelerator: allocated device memory. On the CPU: the resident set of this process; where
    the kernel cannot reset that mark (outside Linux) it is the process's peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float | None:
        """Return the peak in MiB, `None` where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        if sys.platform == "linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 1024
        try:
            import resource
        except ImportError:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / MIB if sys.platform == "darwin" else peak / 1024


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def state_size(optimizers: Iterable[Optimizer]) -> float:
    """Return the size of all tensors in the optimizers' state, in MiB.

    Tensors in lists and dictionaries count (SOAP keeps its factors so), and one that several
    parameters share counts once.

    Example:
        >>> weight = torch.zeros(256, 1024, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> state_size([optimizer])
        1.0
    """
    found = {id(t): t for optimizer in optimizers for t in _tensors(optimizer.state)}
    return sum(t.numel() * t.element_size() for t in found.values()) / MIB
