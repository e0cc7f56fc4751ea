"""Names to objects: tasks and arms, registered ones, those in a user's file, and live ones."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import pkgutil
from functools import cache, cached_property, lru_cache
from typing import Any

from weightlab import tasks
from weightlab.exceptions import UsageError
from weightlab.tasks.base import Task
from weightlab.tasks.files import load_object, source_fingerprint
from weightlab.trial.arm import Arm

LIVE = "live:"
_live: dict[str, Any] = {}


def is_file_reference(ref: str) -> bool:
    """Whether a reference means an object in a user's file, `path.py:object`."""
    return ".py:" in ref or ref.endswith(".py")


def is_live(ref: str) -> bool:
    """Whether a reference means an object of this process, which no other process can load."""
    return ref.startswith(LIVE)


def keep(thing: Any) -> str:
    """Remember a live object and return the reference that this process can load it by."""
    ref = f"{LIVE}{thing.name}@{id(thing):x}"
    _live[ref] = thing
    return ref


@cache
def _registered_arms() -> dict[str, Arm]:
    from weightlab.trial import arms

    found: dict[str, Arm] = {}
    for module in pkgutil.iter_modules(arms.__path__, arms.__name__ + "."):
        for arm in importlib.import_module(module.name).ARMS:
            if arm.name in found:
                raise RuntimeError(f"two arms are called {arm.name!r}; the second is in {module.name}")
            found[arm.name] = arm
    return found


def arm_names() -> list[str]:
    """Return the names of all registered arms, sorted."""
    return sorted(_registered_arms())


@lru_cache(maxsize=64)
def _arm_from_file(ref: str, fingerprint: str) -> Arm:
    thing = load_object(ref)
    if callable(thing) and not isinstance(thing, Arm):
        thing = thing()
    if not isinstance(thing, Arm):
        raise UsageError(
            f"{ref} is a {type(thing).__name__}, not a weightlab.trial.Arm: make it Arm(name=..., ...)"
        )
    return thing


@lru_cache(maxsize=64)
def _task_from_file(ref: str, fingerprint: str) -> Task:
    return tasks.load(ref)


def arm(ref: str) -> Arm:
    """Load an arm.

    Raises:
        UsageError: When the name is unknown (the nearest one is suggested) or the file is unusable.
    """
    if is_live(ref):
        return _live[ref]
    if is_file_reference(ref):
        return _arm_from_file(ref, source_fingerprint(ref))
    known = _registered_arms()
    if ref not in known:
        near = difflib.get_close_matches(ref, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"unknown arm {ref!r}; {hint}known arms: {', '.join(sorted(known))} (or path.py:object)"
        )
    return known[ref]


def task(ref: str) -> Task:
    """Load a task.

    Raises:
        UsageError: When the name is unknown (the nearest one is suggested) or the file is unusable.
    """
    if is_live(ref):
        return _live[ref]
    if is_file_reference(ref):
        return _task_from_file(ref, source_fingerprint(ref))
    return tasks.get(ref)


def _source_hash(thing: object) -> str:
    module = inspect.getmodule(thing)
    try:
        source = inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def arm_fingerprint(ref: str) -> str:
    """Hash what an arm's reference leads to: the user's file, or the module that builds its optimizer."""
    if is_file_reference(ref) and not is_live(ref):
        return source_fingerprint(ref)
    return _source_hash(arm(ref).optimizer)


def _settings(thing: object) -> str:
    computed = {
        name for name in dir(type(thing)) if isinstance(getattr(type(thing), name, None), cached_property)
    }
    return repr(
        {
            name: value
            for name, value in sorted(vars(thing).items())
            if isinstance(value, (int, float, str, bool, tuple))
            and not name.startswith("_")
            and name not in computed
        }
    )


def task_fingerprint(ref: str) -> str:
    """Hash a task's code, settings and data."""
    loaded = task(ref)
    code = (
        source_fingerprint(ref) if is_file_reference(ref) and not is_live(ref) else _source_hash(type(loaded))
    )
    text = "\n".join([code, _settings(loaded), loaded.fingerprint()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
