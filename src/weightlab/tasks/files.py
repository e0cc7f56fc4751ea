"""Objects out of users' Python files, named `path/to/file.py:object`."""

from __future__ import annotations

import difflib
import hashlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from weightlab.exceptions import UsageError, WeightlabError


def is_file_ref(ref: str) -> bool:
    """Whether `ref` points into a file rather than being a registered name.

    Example:
        >>> is_file_ref("my_task.py:task"), is_file_ref("docs-gpt")
        (True, False)
    """
    return ":" in ref or ref.endswith(".py") or "/" in ref or "\\" in ref


def load_object(ref: str) -> object:
    """Execute a Python file and return one of its objects.

    The file's module is kept in `sys.modules` under a name made from its path and contents: files
    with equal names do not clash, an unchanged file is executed once a process, an edited one again.
    The file's folder is appended to `sys.path`, so that it can import its neighbours.

    Args:
        ref: `path/to/file.py:object`, the path relative to the working directory or absolute.

    Raises:
        UsageError: When the reference has no object, or the file is missing, does not parse, raises
            while being executed, or has no such object. The message names file and line.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "mine.py").write_text("answer = 42")
        ...     load_object(f"{folder}/mine.py:answer")
        42
    """
    path, name = _split(ref)
    module = _execute(path)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [key for key in vars(module) if not key.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(
            f"{path} has no object {name!r}; it has: {', '.join(public) or 'nothing'}{hint}"
        ) from None


def source_fingerprint(ref: str) -> str:
    """SHA-256 of the file that `ref` points into, in hex.

    Files that this one imports are not covered.

    Raises:
        UsageError: When the reference has no object or the file cannot be read.
    """
    path, _ = _split(ref)
    return hashlib.sha256(_read(path)).hexdigest()


def _split(ref: str) -> tuple[Path, str]:
    path, separator, name = ref.rpartition(":")
    if not separator:
        path, name = name, ""
    if not path or not name.isidentifier():
        raise UsageError(
            f"{ref!r} does not name an object in a file; write path.py:object, e.g. {path or 'my.py'}:task"
        )
    return Path(path).expanduser(), name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {path}: {reason} (looked in {Path.cwd()})") from None


def _execute(path: Path) -> ModuleType:
    source = _read(path)
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()
    name = f"_weightlab_file_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        code = compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise UsageError(
            f"{path}:{error.lineno or 1}: syntax error: {error.msg}" + (f": {line}" if line else "")
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: not Python source: {error}") from None
    module = ModuleType(name)
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        exec(code, vars(module))
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, WeightlabError) or not isinstance(error, Exception | SystemExit):
            raise
        raise UsageError(f"{location(error, path)}: {summary(error)}") from error
    return module


def location(error: BaseException, path: Path) -> str:
    """`file:line` of the innermost frame of `error` that lies in `path`, or the path alone."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)


def summary(error: BaseException) -> str:
    """One line that says what was raised.

    Example:
        >>> summary(ValueError("first line\\nsecond line"))
        'ValueError: first line'
    """
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
