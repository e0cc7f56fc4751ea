"""Embeddings and labels in files: safetensors and .npy, never unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weightlab.exceptions import UsageError
from weightlab.merge.retrieval import check_embeddings
from weightlab.merge.stored_weights import replacing

_PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npz", ".joblib"}


def read_embeddings(path: str, name: str | None = None) -> Tensor:
    """Read a matrix of embeddings, one item a row.

    Args:
        path: A `.safetensors` or `.npy` file.
        name: Which tensor of a safetensors file; may be left out where only one is a floating-point matrix.

    Returns:
        `(items, dimensions)` in at least float32.

    Raises:
        UsageError: For files that are missing, damaged, pickles or of another kind, an unknown name, and rows that are zero or
            not finite.
    """
    found = _array(path) if _kind(path) == ".npy" else _tensor(path, name, 2)
    try:
        return check_embeddings(found, path)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def read_labels(path: str, name: str | None = None) -> Tensor:
    """Read classes, one for each item: integers, or in a `.npy` file text.

    Args:
        path: A `.safetensors` or `.npy` file.
        name: Which tensor of a safetensors file; may be left out where only one is a vector of integers.

    Returns:
        `(items,)` int64; text becomes the number of its place among all in order.

    Raises:
        UsageError: As `read_embeddings`.
    """
    if _kind(path) == ".npy":
        array = _load(path)
        if array.dtype.kind in "US":
            array = np.unique(array, return_inverse=True)[1].reshape(array.shape)
        if array.dtype.kind not in "iub":
            raise UsageError(f"labels in {path} must be integers or text, got {array.dtype}")
        labels = torch.from_numpy(array.astype(np.int64))
    else:
        labels = _tensor(path, name, 1)
    if labels.ndim != 1 or labels.is_floating_point():
        raise UsageError(
            f"labels in {path} must be one integer an item, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return labels.long()


def write_embeddings(path: str, embeddings: Tensor, name: str = "embeddings") -> None:
    """Write a matrix to a `.safetensors` or `.npy` file, whole or not at all.

    Args:
        path: The file.
        embeddings: What to write; bfloat16 becomes float32 in `.npy`, which has no such type.
        name: Of the tensor in a safetensors file.

    Raises:
        UsageError: For another kind of file.
        WeightlabError: If it cannot be written.
    """
    kind = _kind(path)
    embeddings = embeddings.detach().cpu().contiguous()
    with replacing(Path(path), embeddings.numel() * embeddings.element_size() + 4096) as new:
        if kind == ".safetensors":
            safetensors.torch.save_file({name: embeddings}, os.fspath(new))
        else:
            array = (embeddings.float() if embeddings.dtype == torch.bfloat16 else embeddings).numpy()
            with open(new, "wb") as file:
                np.save(file, array, allow_pickle=False)


def tensor_name(path: str, name: str | None = None) -> str:
    """The name of the embeddings in a safetensors file, or `"embeddings"` for a `.npy` file.

    Raises:
        UsageError: As `read_embeddings`.
    """
    if _kind(path) == ".npy":
        return "embeddings"
    with _opened(path) as file:
        return _choose(file, path, name, 2)


def _kind(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix in _PICKLES:
        raise UsageError(
            f"{path} may hold pickles, which can run code when read; save the tensor as .safetensors or .npy instead"
        )
    if suffix not in (".safetensors", ".npy"):
        raise UsageError(f"{path} must end in .safetensors or .npy")
    return suffix


def _load(path: str) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"no file {path}") from None
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise UsageError(
                f"{path} holds Python objects, or is no .npy file; neither is read, as unpickling can run code"
            ) from error
        raise UsageError(f"{path} is damaged: {error}") from error
    except (OSError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def _array(path: str) -> Tensor:
    array = _load(path)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise UsageError(f"{path} must hold float16, float32 or float64, got {array.dtype}")
    return torch.from_numpy(array)


def _opened(path: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UsageError(f"no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no whole safetensors file: {error}") from error


def _tensor(path: str, name: str | None, ndim: int) -> Tensor:
    with _opened(path) as file:
        return file.get_tensor(_choose(file, path, name, ndim))


def _choose(file: Any, path: str, name: str | None, ndim: int) -> str:
    names = sorted(file.keys())
    if name is not None:
        if name not in names:
            raise UsageError(f"{path} has no tensor {name!r}; it has {', '.join(names) or 'none'}")
        return name

    def fits(each: str) -> bool:
        part = file.get_slice(each)
        return len(part.get_shape()) == ndim and (part.get_dtype()[0] in "FB") == (ndim == 2)

    found = [each for each in names if fits(each)]
    if len(found) != 1:
        what, option = (
            ("matrix", "--new-tensor or --old-tensor")
            if ndim == 2
            else ("vector of labels", "--label-tensor")
        )
        raise UsageError(
            f"{path} has {len(found)} tensors that may be the {what}, of {', '.join(names) or 'none'}; choose by {option}"
        )
    return found[0]
