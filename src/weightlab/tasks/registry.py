"""The tasks that weightlab brings, by name, and the way to a user's own."""

from __future__ import annotations

import difflib
import functools
import importlib
from pathlib import Path
from typing import Any

from weightlab.exceptions import UsageError
from weightlab.tasks.base import Task
from weightlab.tasks.checks import as_task
from weightlab.tasks.files import is_file_ref, load_object, source_fingerprint

_TASKS = {
    "adapt-code": ("adapt_code", "AdaptCode"),
    "adapt-digits": ("adapt_digits", "AdaptDigits"),
    "adapt-digits-contrast": ("adapt_digits", "AdaptDigitsContrast"),
    "adapt-gpt": ("adapt_gpt", "AdaptGPT"),
    "cifar10-resnet": ("cifar10_resnet", "Cifar10ResNet"),
    "digits-mlp": ("digits_mlp", "DigitsMLP"),
    "docs-gpt": ("docs_gpt", "DocsGPT"),
    "english-gpt": ("english_gpt", "EnglishGPT"),
    "mnist-mlp": ("mnist_mlp", "MnistMLP"),
    "shakespeare-gpt": ("shakespeare_gpt", "ShakespeareGPT"),
}


def names() -> list[str]:
    """Names of the registered tasks, sorted.

    Example:
        >>> [name for name in names() if name.endswith("-gpt")]
        ['adapt-gpt', 'docs-gpt', 'english-gpt', 'shakespeare-gpt']
    """
    return sorted(_TASKS)


def get(ref: str, **options: Any) -> Task:
    """Build a task. Its data are not read before they are needed.

    Args:
        ref: A registered name, or `path.py:object` where the object is a `Task`, a class or callable
            that makes one, or anything with the attributes in `Task.required`.
        **options: Arguments of the task's class, e.g. `steps=50`.

    Raises:
        UsageError: When there is no such task, an option does not exist, the file is unusable, or
            its object is no task.

    Example:
        >>> get("docs-gpt", steps=50).steps
        50
    """
    if is_file_ref(ref):
        return as_task(load_object(ref), ref, **options)
    if ref not in _TASKS:
        near = difflib.get_close_matches(ref, names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown task {ref!r}; {hint}Known: {', '.join(names())}; your own: path.py:object")
    module, attribute = _TASKS[ref]
    return as_task(getattr(importlib.import_module(f"weightlab.tasks.{module}"), attribute), ref, **options)


def load(ref: str) -> Task:
    """Like `get` without options, but one object a process for as long as the file is unchanged.

    Workers that carry out many runs of a task load it by this and read its data once.
    """
    return _load(ref, source_fingerprint(ref) if is_file_ref(ref) else "", str(Path.cwd()))


@functools.lru_cache(maxsize=16)
def _load(ref: str, source: str, folder: str) -> Task:
    return get(ref)
