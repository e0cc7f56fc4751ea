"""Where `weightlab adapt` keeps an unfinished run, and how the finished adapter comes into its place."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightlab.exceptions import UsageError

REPORT = "weightlab.json"
_ADAPTER = "adapter_config.json"


class Workplace:
    """The folder of an adapter to be, and beside it that of the run that makes it.

    Args:
        out: Folder that the adapter will be in.
        settings: What determines the run.
        resume: Whether to go on with an unfinished run.
        force: Whether to replace an adapter, and to forget an unfinished run.

    Attributes:
        out: The former.
        folder: The latter, `<out>.unfinished`.

    Raises:
        UsageError: If there is something already, neither to be resumed nor replaced, or the unfinished run is another.
    """

    def __init__(self, out: str, settings: Mapping[str, Any], *, resume: bool, force: bool) -> None:
        self.out = Path(out).expanduser().resolve()
        self.folder = self.out.with_name(f"{self.out.name}.unfinished")
        self._settings = json.loads(json.dumps(settings))
        if self.out.exists():
            if resume:
                raise UsageError(f"{out} exists: there is nothing to resume; --force starts over")
            if not force:
                raise UsageError(f"{out} exists; give another --out, or --force to replace it")
            if not (self.out / _ADAPTER).exists():
                raise UsageError(
                    f"{out} exists and is not an adapter's folder, which --force does not replace"
                )
        if self.kept and not (resume or force):
            raise UsageError(
                f"{self.folder} holds an unfinished run; --resume continues it, --force starts over"
            )
        if self.kept and resume:
            self._check_same()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    @property
    def kept(self) -> bool:
        """Whether there is a run to resume."""
        return self.checkpoint is not None

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the last complete checkpoint."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("checkpoint-*")
            # The Trainer writes its state last.
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
            and (path / "trainer_state.json").exists()
        }
        return found[max(found)] if found else None

    @property
    def step(self) -> int:
        """Step of that checkpoint, 0 if there is none."""
        checkpoint = self.checkpoint
        return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])

    def read(self) -> dict[str, Any]:
        """Return what `write` kept."""
        try:
            return json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except OSError:
            return {}

    def write(self, state: Mapping[str, Any]) -> None:
        """Keep what a resumed run must know, beside the settings."""
        _write_json(self.folder / "state.json", {**state, "settings": self._settings})

    def _check_same(self) -> None:
        before = self.read().get("settings", {})
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise UsageError(
                    f"the unfinished run has {name}={before.get(name)!r}, not {value!r}; resume it with the same "
                    "settings, or start over with --force"
                )

    def publish(self, adapter: Path, report: Mapping[str, Any]) -> None:
        """Move the finished adapter, a folder in `folder`, to its place, and remove the rest."""
        _write_json(adapter / REPORT, report)
        if self.out.exists():
            os.replace(self.out, self.folder / "replaced")
        os.replace(adapter, self.out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def clean(self) -> None:
        """Remove a run of which nothing can be resumed."""
        if not self.kept:
            shutil.rmtree(self.folder, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
