"""What weightlab's source says about itself, read without importing anything that needs torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def is_entry(source: str) -> bool:
    """Whether a module's source defines `PAPER` at its top level.

    Example:
        >>> is_entry("PAPER = 1"), is_entry("x = 'PAPER = 1'")
        (True, False)
    """
    return any(line.startswith(("PAPER =", "PAPER:")) for line in source.splitlines())


def exists(part: str) -> bool:
    """Whether a public name such as `"optim.AuON"` or `"nn.functional.group_rational"` exists.

    The room is imported, which is cheap because its names are lazy, and asked for its `__all__`; a
    name within one of its modules is looked up in that module's source.

    Example:
        >>> exists("papers.get"), exists("papers.schema.Paper"), exists("papers.get_rich"), exists("attic.Old")
        (True, True, False, False)
    """
    room, _, path = part.partition(".")
    name, _, inner = path.partition(".")
    package = f"weightlab.{room}"
    try:
        public = getattr(importlib.import_module(package), "__all__", ())
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return False
    if not inner:
        return name in public
    spec = importlib.util.find_spec(f"{package}.{name}")
    return spec is not None and spec.origin is not None and inner in _top_level_names(Path(spec.origin))


@cache
def arms() -> dict[str, tuple[str, ...]]:
    """Return paper slug -> names of the registered arms that name it as their paper."""
    found: dict[str, list[str]] = {}
    for file in sorted((_PACKAGE / "trial" / "arms").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Arm":
                given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
                if isinstance(given.get("paper"), str) and isinstance(given.get("name"), str):
                    found.setdefault(str(given["paper"]), []).append(str(given["name"]))
    return {slug: tuple(names) for slug, names in found.items()}


@cache
def _top_level_names(file: Path) -> frozenset[str]:
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8"))))


def _names(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name for alias in aliases)
            case _:
                pass
