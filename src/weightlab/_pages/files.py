"""Writing a report's files: whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from weightlab.exceptions import WeightlabError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file so that a reader sees the old content or the new, never a part.

    Folders above `path` are made. Line ends are written as they are in `text`.

    Raises:
        WeightlabError: When the file cannot be written; what was there before is left as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder, "new", "page.html"), "<p>").read_text()
        '<p>'
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "x", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise WeightlabError(
            f"cannot write {target}: {error.strerror or error}; free the place or choose another"
        ) from error
    return target
