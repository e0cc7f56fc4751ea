"""Names to objects: tasks and arms, registered ones, those in a user's file, and live ones."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import pkgutil
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import weightlab
from weightlab import tasks
from weightlab.exceptions import UsageError
from weightlab.tasks.base import Task
from weightlab.tasks.files import load_object, source_fingerprint
from weightlab.trial.arm import Arm

LIVE = "live:"
UPPER_ROOMS = {"tasks", "trial", "papers", "cli.py", "__main__.py"}
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
    for _, name, _ in pkgutil.iter_modules(arms.__path__):
        if name.startswith("_"):
            continue
        for arm in importlib.import_module(f"{arms.__name__}.{name}").ARMS:
            if arm.name in found:
                raise RuntimeError(f"two arms are called {arm.name!r}; the second is in {name}.py")
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


@cache
def _code_hash(*parts: str) -> str:
    """Hash source below the package: the named files and folders; `"."` means every room of methods."""
    root = Path(weightlab.__file__).parent
    digest = hashlib.sha256()
    for part in parts:
        places = [p for p in root.iterdir() if p.name not in UPPER_ROOMS] if part == "." else [root / part]
        files = {file for place in places for file in ([place] if place.is_file() else place.rglob("*.py"))}
        for file in sorted(files):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:32]


def _own_code(ref: str, thing: object) -> str:
    if not is_live(ref):
        return source_fingerprint(ref) if is_file_reference(ref) else ""
    module = inspect.getmodule(thing)
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest() if module else ""
    except (OSError, TypeError):  # typed into an interpreter
        return ""


def arm_fingerprint(ref: str) -> str:
    """Hash the code behind an arm: the methods, the training loop, registered arms, and the user's own file."""
    loaded = arm(ref)
    own = _own_code(ref, loaded.optimizer)
    return hashlib.sha256(
        f"{own} {_code_hash('.', 'trial/arms', 'trial/arm.py', 'trial/runner.py')}".encode()
    ).hexdigest()[:32]


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
    facts = [_own_code(ref, type(loaded)), _code_hash("tasks"), _settings(loaded), loaded.fingerprint()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
