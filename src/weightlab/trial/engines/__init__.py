"""Where runs are carried out: in this process, in local processes, on a Ray cluster."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from weightlab.exceptions import UsageError

if TYPE_CHECKING:
    from weightlab.trial.engines.base import Engine
    from weightlab.trial.spec import Progress

NAMES = ("local", "process", "ray")


def create(
    name: str,
    workers: int | None = None,
    device: str = "cpu",
    address: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Engine:
    """Make the engine called `name`.

    Args:
        name: `"local"`: one run at a time, in this process. `"process"`: local worker processes.
            `"ray"`: a Ray cluster, or one started on this machine.
        workers: Runs in flight at once; `"local"` has one. Default: the CPUs that this process may
            use, or one a GPU when `device` is `"cuda"`, one on any other accelerator.
        device: Torch device string of the runs. With `"cuda"` runs are spread over all GPUs.
        address: Ray cluster to join, e.g. `"auto"`.
        on_progress: Called with signs of life from runs in flight.

    Raises:
        UsageError: When the engine is unknown, `workers` is below 1, or an address is given to an
            engine that joins no cluster.
        MissingDependencyError: When `"ray"` is asked for and not installed.

    Example:
        >>> with create("local") as engine:
        ...     engine.capacity, engine.running
        (1, 0)
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"unknown engine {name!r}; {hint}known engines: {', '.join(NAMES)}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1; got {workers}")
    if address is not None and name != "ray":
        raise UsageError(f"an address ({address!r}) is for the engine 'ray'; the engine is {name!r}")
    if name == "local":
        from weightlab.trial.engines.local import LocalEngine

        return LocalEngine(on_progress)
    if name == "process":
        from weightlab.trial.engines.process import ProcessEngine

        devices = _devices(device)
        return ProcessEngine(workers or _default_workers(device), on_progress, devices=devices)
    from weightlab.trial.engines.ray import RayEngine

    return RayEngine(workers or _default_workers(device), on_progress, address=address)


def _devices(device: str) -> tuple[str, ...]:
    if device != "cuda":
        return (device,)
    import torch

    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or (device,)


def _default_workers(device: str) -> int:
    if device != "cpu":
        return len(_devices(device))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
