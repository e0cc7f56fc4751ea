"""Whether an object can serve as a task, and what is missing if not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.exceptions import UsageError, WeightlabError
from weightlab.tasks.base import Split, Task
from weightlab.tasks.files import summary

_SIGNATURES = {
    "build": "build(generator)",
    "batches": "batches(split, generator)",
    "loss": "loss(model, batch)",
    "evaluate": "evaluate(model, split)",
}


class _Adapted(Task):
    """A task made of an object that has a task's attributes without being a `Task`."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.name, self.metric, self.mode = target.name, target.metric, target.mode
        self.batch_size = target.batch_size
        self.steps = getattr(target, "steps", Task.steps)
        self.target = getattr(target, "target", Task.target)
        self.minimal_effect = getattr(target, "minimal_effect", Task.minimal_effect)
        self.description = getattr(target, "description", Task.description)

    def build(self, generator: torch.Generator) -> nn.Module:
        return self._target.build(generator)

    def batches(self, split: Split, generator: torch.Generator) -> Iterable[Any]:
        return self._target.batches(split, generator)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._target.loss(model, batch)

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        return self._target.evaluate(model, split)

    def fingerprint(self) -> str:
        return self._target.fingerprint() if hasattr(self._target, "fingerprint") else ""


def as_task(candidate: object, where: str, **options: Any) -> Task:
    """Return `candidate` as a `Task` whose facts are present and make sense.

    Args:
        candidate: A `Task`; a class or a callable that makes one; or any object with the attributes
            in `Task.required`. Facts that it lacks (`steps`, `target`, ...) take `Task`'s defaults.
        where: How to call the object in messages, e.g. `"my_task.py:task"`.
        **options: Passed on to the class or callable.

    Raises:
        UsageError: When an attribute is missing or has an impossible value; the message names it,
            the value and the mend.

    Example:
        >>> as_task(3, "my_task.py:task")
        Traceback (most recent call last):
        weightlab.exceptions.UsageError: my_task.py:task is no task: an int has no attribute name, ...
    """
    if isinstance(candidate, type) or (callable(candidate) and not _present(candidate)):
        candidate = _call(candidate, where, options)
    elif options:
        raise UsageError(
            f"{where} takes no options ({', '.join(options)}): it is a finished task, not a class or function"
        )
    missing = [name for name in Task.required if not hasattr(candidate, name)]
    if missing:
        kind = type(candidate).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        raise UsageError(
            f"{where} is no task: {article} {kind} has no attribute {', '.join(missing)}; "
            f"a task needs {', '.join(Task.required)}"
        )
    task = candidate if isinstance(candidate, Task) else _Adapted(candidate)
    _check_facts(task, where)
    for name, form in _SIGNATURES.items():
        _check_signature(getattr(candidate, name), form, where)
    return task


def _present(candidate: object) -> bool:
    return any(hasattr(candidate, name) for name in Task.required)


def _call(factory: Any, where: str, options: dict[str, Any]) -> object:
    try:
        return factory(**options)
    except WeightlabError:
        raise
    except Exception as error:
        raise UsageError(f"{where} could not be made into a task by calling it: {summary(error)}") from error


def _check_facts(task: Task, where: str) -> None:
    for name in ("name", "metric"):
        value = getattr(task, name)
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{where}: {name} must be a non-empty string, not {value!r}")
    if task.mode not in ("min", "max"):
        raise UsageError(
            f"{where}: mode must be 'min' (smaller {task.metric} is better) or 'max', not {task.mode!r}"
        )
    for name in ("batch_size", "steps"):
        value = getattr(task, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{where}: {name} must be a whole number of at least 1, not {value!r}")
    if task.target is not None and not _finite(task.target):
        raise UsageError(f"{where}: target must be a finite number or None, not {task.target!r}")
    if not _finite(task.minimal_effect) or task.minimal_effect < 0:
        raise UsageError(f"{where}: minimal_effect must be a finite number >= 0, not {task.minimal_effect!r}")
    if not isinstance(task.description, str):
        raise UsageError(f"{where}: description must be a string, not {task.description!r}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_signature(method: Any, form: str, where: str) -> None:
    name = form.partition("(")[0]
    if not callable(method):
        raise UsageError(f"{where}: {name} must be a method, {form}; it is {method!r}")
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * (form.count(",") + 1))
    except TypeError:
        raise UsageError(f"{where}: {name}{signature} must be callable as {form}") from None
