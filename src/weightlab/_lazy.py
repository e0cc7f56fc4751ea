"""Lazy imports: rooms that cost nothing until used, optional packages that explain themselves."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from weightlab.exceptions import MissingDependencyError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Args:
        module: Importable name, e.g. `"optuna"` or `"sklearn.datasets"`.
        extra: Name of weightlab's extra that brings it, e.g. `"trial"`.

    Raises:
        MissingDependencyError: When the package is not installed. It is also an `ImportError`.

    Example:
        >>> require("json", "trial").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingDependencyError(
            f"{package} is not installed; install it with: pip install 'weightlab[{extra}]'"
        ) from error


def exports(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build `__getattr__`, `__dir__` and `__all__` for a package that imports its parts on first use.

    Args:
        package: The package's `__name__`.
        names: Public name -> module, relative to the package, that defines it. An empty module
            string means that the name is itself a submodule.

    Returns:
        The triple to assign to `__getattr__`, `__dir__`, `__all__` in the package.

    Example:
        >>> getter, _, public = exports("os", {"join": ".path"})
        >>> getter("join").__name__, public
        ('join', ['join'])
    """

    def getter(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if names[name] == "":
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(names[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return getter, lambda: sorted(names), sorted(names)
