"""Reading checkpoints of any kind tensor by tensor, without running what they hold."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weightlab.exceptions import UsageError
from weightlab.inspect.hub_weights import hub_weights

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]

_INDEX = "model.safetensors.index.json"
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What training scripts put a state dict under.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Ids on the Hub; what ends like a file is none.
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)(?<!\.pth)(?<!\.bin)(?<!\.ckpt)(?<!\.safetensors)")
# Bytes read from a mapped file before it is mapped anew, which gives back the pages of tensors read so far.
_KEPT_PAGES = 1 << 27
_ZIP = b"PK\x03\x04"
# The number that torch.save of old began its files with, as pickled.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class TensorInfo(NamedTuple):
    """What is known of a tensor without its values. `dtype` is None for a type that PyTorch does not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Checkpoint(Mapping[str, Tensor]):
    """Named tensors of a model, loaded one at a time when they are asked for.

    - A module: its parameters, each tied one once.
    - A state dict.
    - A safetensors file, or a folder that has one (`model.safetensors`, or the only one in it) or is
      sharded as on the Hugging Face Hub (`model.safetensors.index.json`; `pytorch_model.bin.index.json` if there are
      no safetensors).
    - An id `owner/name` on the Hugging Face Hub, if there is no such file or folder; it is looked for in the folder
      `WEIGHTLAB_DATA` first.
    - A folder with a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors` or `.bin`).
    - A file of `torch.save` (`.pt`, `.pth`, `.bin`, ...), by `torch.load` with `weights_only=True`, mapped and not
      read where its format allows. A state dict under `"state_dict"`, `"model_state_dict"`, `"model"` or
      `"module"` is found. Files that hold anything but tensors and plain values are refused, because loading them would
      run code.

    A prefix `module.` that all names have is dropped. Names of safetensors, which have no order of their own, are sorted
    by their parts, numbers by size; others keep their order.

    Args:
        source: As above.

    Attributes:
        source: Path as text, or the class of the module or mapping.
        adapter_config: Contents of `adapter_config.json`; None if there is no adapter.

    Raises:
        TypeError: If `source` is none of these.
        UsageError: If there is no such file, or it is truncated, of another format, a pickle that would run code, or
            holds no tensors; if a shard is missing.

    Example:
        >>> checkpoint = Checkpoint(nn.Linear(3, 2))
        >>> {name: info.shape for name, info in checkpoint.infos.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> checkpoint["bias"].shape
        torch.Size([2])
    """

    def __init__(self, source: Source) -> None:
        self.infos: dict[str, TensorInfo] = {}
        """Shape and type of each tensor, by name."""
        self.adapter_config: dict[str, Any] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._files: list[Path] = []
        self._places: dict[str, tuple[Path, str]] = {}
        self._mapped: dict[Path, _Mapped] = {}
        if isinstance(source, nn.Module):
            self.source = type(source).__name__
            self._keep(dict(source.named_parameters()))
        elif isinstance(source, Mapping):
            self.source = type(source).__name__
            self._keep(source)
        elif isinstance(source, str | os.PathLike):
            path = Path(source).expanduser()
            self.source = str(source)
            if not path.exists() and _REPOSITORY.fullmatch(self.source):
                path = hub_weights(self.source)
            if path.is_dir():
                self._open_folder(path)
            else:
                self._open_file(path)
        else:
            raise TypeError(f"a checkpoint is a module, a state dict or a path, got {type(source).__name__}")
        if not self.infos:
            raise UsageError(f"{self.source} holds no tensors")
        self._drop_prefix("module.")
        if any(file.suffix == ".safetensors" for file in self._files):
            self.infos = {name: self.infos[name] for name in sorted(self.infos, key=_by_parts)}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it reads from; none for a module or mapping."""
        return tuple(self._files)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Contents of the model's `config.json`, from the folder that its files lie in; empty if there is none."""
        beside = self._files[0].with_name("config.json") if self._files else None
        return _read_json(beside) if beside is not None and beside.is_file() else {}

    def __getitem__(self, name: str) -> Tensor:
        """Load a tensor, on the CPU if it comes from a file."""
        if name in self._tensors:
            return self._tensors[name].detach()
        path, stored = self._places[name]
        if path in self._mapped:
            return self._mapped[path].get(stored)
        try:
            # Opened anew for each tensor, so that the pages of those that came before are given back.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot read {stored} from {path}: {error}") from error

    def row(self, name: str, index: int) -> Tensor:
        """Load `self[name][index]`, and of a safetensors file no more than that."""
        path, stored = self._places.get(name, (None, ""))
        if path is None or path in self._mapped:
            return self[name][index]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(stored)[index : index + 1][0]
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot read {stored} from {path}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def _keep(self, tensors: Mapping[Any, Any]) -> None:
        seen: set[tuple[Any, ...]] = set()
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                continue
            place = (
                (tensor.data_ptr(), tensor.shape, tensor.stride()) if not tensor.is_meta else (id(tensor),)
            )
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            self._tensors[str(name)] = tensor
            self.infos[str(name)] = TensorInfo(tuple(tensor.shape), tensor.dtype)

    def _drop_prefix(self, prefix: str) -> None:
        if all(name.startswith(prefix) for name in self.infos):
            self.infos = {name.removeprefix(prefix): info for name, info in self.infos.items()}
            self._tensors = {name.removeprefix(prefix): tensor for name, tensor in self._tensors.items()}
            self._places = {name.removeprefix(prefix): place for name, place in self._places.items()}

    def _open_folder(self, folder: Path) -> None:
        if (folder / _ADAPTER[0]).is_file():
            self.adapter_config = _read_json(folder / _ADAPTER[0])
            old = not (folder / _ADAPTER[1]).is_file() and (folder / _ADAPTER[2]).is_file()
            self._open_file(folder / _ADAPTER[2 if old else 1])
            return
        if (folder / _INDEX).is_file():
            self._open_shards(folder, _INDEX)
            return
        files = sorted(folder.glob("*.safetensors"))
        if (folder / "model.safetensors").is_file():
            files = [folder / "model.safetensors"]
        elif not files and (folder / _TORCH[1]).is_file():
            self._open_shards(folder, _TORCH[1])
            return
        elif not files and (folder / _TORCH[0]).is_file():
            files = [folder / _TORCH[0]]
        if len(files) != 1:
            found = ", ".join(file.name for file in files[:5]) or "no safetensors file"
            raise UsageError(
                f"{folder} is no checkpoint: it has neither model.safetensors nor {_INDEX}, but {found}; name the file"
            )
        self._open_file(files[0])

    def _open_shards(self, folder: Path, index: str) -> None:
        named = _read_json(folder / index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise UsageError(f"{folder / index} is damaged: it has no weight_map of names to files")
        shards = sorted(set(named.values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise UsageError(
                f"{folder} is incomplete: {len(missing)} of {len(shards)} shards are missing, e.g. {missing[0]}"
            )
        for shard in shards:
            self._open_file(folder / shard)
        if absent := sorted(set(named) - set(self.infos)):
            raise UsageError(
                f"{folder} is damaged: its index names {absent[0]}, which {named[absent[0]]} does not hold"
            )

    def _open_file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                start = file.read(len(_LEGACY))
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror or error} (looked in {Path.cwd()})"
            ) from error
        if not start:
            raise UsageError(f"{path} is empty")
        self._files.append(path)
        if path.suffix == ".safetensors":
            self._open_safetensors(path)
        elif start.startswith((_ZIP, b"\x80")):
            self._open_torch(path, start)
        else:
            raise UsageError(
                f"{path} is no checkpoint that can be read: its name does not end in .safetensors, and torch.save did "
                "not write it"
            )

    def _open_safetensors(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    held = file.get_slice(name)
                    self.infos[name] = TensorInfo(tuple(held.get_shape()), _DTYPES.get(held.get_dtype()))
                    self._places[name] = (path, name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} is truncated, damaged or no safetensors file: {error}") from error

    def _open_torch(self, path: Path, start: bytes) -> None:
        zipped = start.startswith(_ZIP)
        if zipped and not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is truncated: the end of its archive is missing; copy it again")
        if not zipped and start != _LEGACY:
            raise UsageError(
                f"{path} is a plain pickle, which may run code when it is loaded, and is not read; save the state dict "
                "with safetensors or torch.save"
            )
        tensors = _load(path, mapped=zipped)
        before = set(self.infos)
        self._keep(tensors)
        if zipped:
            self._mapped[path] = _Mapped(path, tensors)
            for name in set(self.infos) - before:
                del self._tensors[name]
                self._places[name] = (path, name)


class _Mapped:
    """Tensors of a file that is mapped into memory."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path, self._tensors, self._read = path, tensors, 0

    def get(self, name: str) -> Tensor:
        size = self._tensors[name].nbytes
        if self._read and self._read + size > _KEPT_PAGES:
            self._tensors, self._read = _load(self._path, mapped=True), 0
        self._read += size
        return self._tensors[name].detach()


def _load(path: Path, *, mapped: bool) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save by name."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds more than tensors, and loading it would run code ({_reason(error)}); save its state "
            "dict alone"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is truncated or damaged: {_reason(error)}") from error
    for _ in _WRAPPERS:
        if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
            break
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), {})
    if not isinstance(content, Mapping):
        return {}
    return {
        str(name): tensor
        for name, tensor in content.items()
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided
    }


def _by_parts(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object")
    return content


def _reason(error: Exception) -> str:
    """The line of torch.load's message that names what is wrong, or its first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "GLOBAL" in line or "global" in line), lines[0])
