"""Decoded data on disk, so that thousands of image files are decompressed once a machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightlab.tasks.digest import digest


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/weightlab`, by default `~/.cache/weightlab`. May be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weightlab"


class TensorCache:
    """Tensors made from files, kept until one of the files changes (path, size or time of change).

    Args:
        name: Start of the cache file's name, e.g. `"ylecun--mnist--train"`.
        sources: Files that the tensors are made from.
        make: Makes them; called when the cache has nothing.

    A folder that cannot be written only costs the caching.
    """

    def __init__(self, name: str, sources: Sequence[Path], make: Callable[[], Mapping[str, Tensor]]) -> None:
        facts = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
        self.path = cache_folder() / f"{name}-{digest(facts)[:16]}.safetensors"
        self._make = make

    def tensors(self) -> dict[str, Tensor]:
        """Read the tensors, or make and keep them."""
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(self.path)
        return self._fill()[0]

    def fingerprint(self) -> str:
        """SHA-256 of the tensors' contents; reads a header only, once they are cached."""
        with contextlib.suppress(OSError, SafetensorError), safe_open(self.path, framework="pt") as file:
            return file.metadata()["sha256"]
        return self._fill()[1]

    def _fill(self) -> tuple[dict[str, Tensor], str]:
        tensors = dict(self._make())
        contents = digest(*(item for name in sorted(tensors) for item in (name, tensors[name])))
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            os.close(handle)
            try:
                save_file(tensors, temporary, metadata={"sha256": contents})
                os.replace(temporary, self.path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        return tensors, contents
