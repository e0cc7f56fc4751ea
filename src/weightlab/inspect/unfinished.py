"""What was read before a stop: kept in a file beside, a line a layer, until all is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from weightlab._pages.files import write_text
from weightlab.exceptions import UsageError, WeightlabError

FOLDER = Path("weightlab-out")


class KeptRows:
    """Results of an unfinished reading.

    They are in a file of the folder `weightlab-out` whose name is a digest of what was read (paths, sizes, times of
    change) and how, so that results of other files or settings are never taken. A last line that was cut off is
    dropped.

    Args:
        files: The files that are read.
        settings: What determines the results, in JSON types.
        resume: Whether to go on with what is there.
        force: Whether to forget it.

    Attributes:
        path: The file.
        rows: What is kept, by name.
        problem: Why results are not kept; None if they are.

    Raises:
        UsageError: If there is something, and it is to be neither resumed nor forgotten.
    """

    def __init__(
        self, files: Iterable[Path], settings: Mapping[str, Any], *, resume: bool, force: bool
    ) -> None:
        states = [(path.resolve(), path.stat()) for path in files]
        identity = {
            "files": [[str(path), state.st_size, state.st_mtime_ns] for path, state in states],
            "settings": dict(settings),
        }
        head = json.dumps(identity, sort_keys=True)
        self.path = FOLDER / f"inspect-{hashlib.sha256(head.encode()).hexdigest()[:16]}.unfinished.jsonl"
        self.rows: dict[str, Any] = {}
        self.problem: str | None = None
        self._head = head
        self._file: TextIO | None = None
        kept = self._read()
        if kept and not (resume or force):
            raise UsageError(
                f"{self.path} holds an unfinished run, {len(kept)} done; --resume goes on from there, "
                "--force starts over"
            )
        if kept and resume:
            self.rows = kept
        else:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        kept: dict[str, Any] = {}
        for line in lines[1:] if lines[:1] == [self._head] else []:
            try:
                name, value = json.loads(line)
            except ValueError:
                break
            kept[name] = value
        return kept

    def add(self, name: str, value: Any) -> None:
        """Keep a result. If that fails, `problem` says why, and the reading goes on."""
        self.rows[name] = value
        if self.problem is not None:
            return
        try:
            if self._file is None:
                lines = [self._head, *(json.dumps(item) for item in self.rows.items())]
                write_text(self.path, "\n".join(lines) + "\n")
                self._file = self.path.open("a", encoding="utf-8")
            else:
                self._file.write(json.dumps([name, value]) + "\n")
            self._file.flush()
        except WeightlabError as error:
            self.problem = str(error)
        except OSError as error:
            self.problem = f"cannot write {self.path}: {error.strerror or error}"

    def close(self) -> None:
        """Leave the file as it is."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self.problem = f"cannot write {self.path}: {error.strerror or error}"
            self._file = None

    def discard(self) -> None:
        """Remove the file, and the folder if it holds nothing else."""
        self.close()
        # What cannot be removed does no harm.
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
            if not any(FOLDER.iterdir()):
                FOLDER.rmdir()
