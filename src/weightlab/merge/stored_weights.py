"""Weights in safetensors files: reading them one at a time, and writing others in the same layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from weightlab.exceptions import UsageError, WeightlabError
from weightlab.inspect import Checkpoint

# What lies beside weights and describes the model, not this training of it.
_KEPT = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".merges"}
_LEFT = {"trainer_state.json", "adapter_config.json", "pytorch_model.bin.index.json"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name in the checkpoint, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file: what comes before the first tensor, byte by byte, and the tensors in their order."""

    path: Path
    header: bytes
    tensors: tuple[Stored, ...]


class StoredWeights:
    """The weights in a safetensors file, or in a folder laid out as on the Hugging Face Hub.

    Args:
        path: File, or folder with `model.safetensors`, a single other safetensors file, or shards and their index.

    Attributes:
        path: As given.
        root: The file or folder.
        tensors: Tensors by name, read when they are asked for.
        shards: The files, in order.

    Raises:
        UsageError: If it is an adapter or a pickle, or as `Checkpoint`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.root = Path(path).expanduser()
        self.is_folder = self.root.is_dir()
        if (self.root / "adapter_config.json").is_file():
            raise UsageError(f"{path} is an adapter; use weightlab merge-adapters")
        if self.root.exists() and not (
            any(self.root.glob("*.safetensors")) if self.is_folder else self.root.suffix == ".safetensors"
        ):
            raise UsageError(
                f"{path} {'has' if self.is_folder else 'is'} no safetensors file; pickles (.pt, .bin, ...) are not merged: "
                "save the state dict with safetensors.torch.save_file first"
            )
        if not self.root.exists():
            raise UsageError(f"there is no file or folder {path} (looked in {Path.cwd()})")
        self.tensors = Checkpoint(path)
        for file in self.tensors.files:
            if self.is_folder and file.parent != self.root:
                raise UsageError(
                    f"{path} is damaged: its index names {file}, which does not lie in the folder itself"
                )
        self.shards = tuple(self._shard(file) for file in self.tensors.files)

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(len(shard.header) + sum(t.end - t.start for t in shard.tensors) for shard in self.shards)

    def _shard(self, path: Path) -> Shard:
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(int.from_bytes(length, "little"))
        entries = json.loads(header[8:])
        tensors = []
        for stored, entry in entries.items():
            if stored != "__metadata__":
                name = stored if stored in self.tensors else stored.removeprefix("module.")
                start, end = entry["data_offsets"]
                tensors.append(Stored(name, entry["dtype"], tuple(entry["shape"]), start, end))
        return Shard(path, header, tuple(sorted(tensors, key=lambda t: (t.start, t.end))))

    def write_like(self, target: Path, value: Callable[[Stored], Tensor | None]) -> None:
        """Write other weights in this layout: the same files, order, dtypes and metadata.

        Args:
            target: File, or an empty folder if this is one; what describes the model (config, tokenizer) is copied along.
            value: Gives a tensor of the shape stored; it is written in the dtype stored. None: the bytes of this one.

        Raises:
            OSError: If it cannot be written.
        """
        for shard in self.shards:
            path = target / shard.path.name if self.is_folder else target
            with shard.path.open("rb") as source, path.open("xb") as file:
                file.write(shard.header)
                for stored in shard.tensors:
                    tensor = value(stored)
                    if tensor is None:
                        source.seek(len(shard.header) + stored.start)
                        _copy(source, file, stored.end - stored.start)
                    elif tensor.numel():
                        tensor = tensor.to(self.tensors.infos[stored.name].dtype).contiguous()
                        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
        if self.is_folder:
            self._copy_description(target)

    def _copy_description(self, target: Path) -> None:
        for path in sorted(self.root.iterdir()):
            if (
                path.is_file()
                and (path.suffix in _KEPT or path.name.startswith(("LICENSE", "NOTICE")))
                and path.name not in _LEFT
                and not (target / path.name).exists()
            ):
                shutil.copyfile(path, target / path.name)


def _copy(source: IO[bytes], file: IO[bytes], count: int) -> None:
    while count:
        chunk = source.read(min(count, 1 << 24))
        if not chunk:
            raise OSError("the file ended early while it was read")
        file.write(chunk)
        count -= len(chunk)


@contextmanager
def replacing(target: Path, size: int) -> Iterator[Path]:
    """Give a path beside the target, and rename what lies there to the target when all went well.

    Args:
        target: File or folder; what was there before is replaced.
        size: Bytes that will be written; refused beforehand if they are not free.

    Raises:
        WeightlabError: If it cannot be written. Nothing of it is left then, and what was at the target still is.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise WeightlabError(
                f"{target} takes {file_size(size)}, and {file_size(free)} are free there; free space, or choose another --out"
            )
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            new = Path(place) / "new"
            yield new
            if target.is_dir():
                os.replace(target, Path(place) / "old")
            os.replace(new, target)
    except OSError as error:
        raise WeightlabError(
            f"cannot write {target}: {error.strerror or error}; nothing was written"
        ) from error


def file_size(size: int) -> str:
    """Write a number of bytes.

    Example:
        >>> file_size(19576), file_size(13_500_000_000)
        ('19.6 kB', '13.5 GB')
    """
    unit, name = next(
        (u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if size >= u or u == 1
    )
    return f"{size / unit:.3g} {name}"
