"""Labelled examples out of files: arrays, Parquet with images, folders of images."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weightlab._lazy import require
from weightlab.exceptions import UsageError
from weightlab.tasks.files import summary

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True, eq=False)
class Labelled:
    """Examples with their classes.

    Attributes:
        inputs: `(N, ...)`, uint8 or float32; images are `(N, C, H, W)`, C 1 or 3.
        labels: int64 `(N,)`.
        classes: Names of the classes; empty for numbers.
    """

    inputs: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()


def read_arrays(path: Path) -> tuple[Labelled, Labelled | None]:
    """Read `x` and `y`, and `x_test` and `y_test` if they are there, from `.npz` or `.safetensors`.

    Raises:
        UsageError: If the file cannot be read, lacks them, or they are no examples with classes from 0.
    """
    try:
        arrays = _safetensors(path) if path.suffix == ".safetensors" else _npz(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"cannot read {path}: {summary(error)}") from None
    train = _labelled(arrays, "x", "y", path)
    return train, _labelled(arrays, "x_test", "y_test", path) if "x_test" in arrays else None


def _npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.atleast_1d(file[name])) for name in file.files}


def _safetensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _labelled(arrays: Mapping[str, Tensor], x: str, y: str, path: Path) -> Labelled:
    for name in (x, y):
        if name not in arrays:
            raise UsageError(f"{path} has no array {name}; it has: {', '.join(arrays) or 'none'}")
    inputs, labels = arrays[x], arrays[y]
    if inputs.ndim < 2 or len(inputs) == 0 or inputs.is_complex():
        raise UsageError(
            f"{path}: {x} must hold examples, (N, ...), real; it is {tuple(inputs.shape)} {inputs.dtype}"
        )
    if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise UsageError(
            f"{path}: {y} must hold a whole number an example, ({len(inputs)},); it is {tuple(labels.shape)} "
            f"{labels.dtype}"
        )
    if inputs.dtype != torch.uint8:
        inputs = inputs.float()
        if not bool((finite := inputs.flatten(1).isfinite().all(1)).all()):
            raise UsageError(f"{path}: {x} is not finite at example {int(finite.int().argmin())}")
    if inputs.ndim == 4 and inputs.shape[1] not in (1, 3) and inputs.shape[-1] in (1, 3):
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    if inputs.ndim == 3:
        inputs = inputs[:, None]
    return Labelled(inputs, _checked(labels.long(), f"{path}: {y}"))


def read_parquet(
    files: Sequence[Path], image: str, label: str, size: int | None, limit: int | None = None
) -> Labelled:
    """Read encoded images and labels in the Hub's layout.

    Args:
        files: Parquet files of one split.
        image: Column of images, `{bytes, path}` or bytes.
        label: Column of labels, numbers or texts.
        size: Side to which images are scaled.
        limit: Read the first so many only.

    Raises:
        UsageError: If a file or an image cannot be read, or a column is missing.
        MissingDependencyError: Without pyarrow or Pillow.
    """
    parquet = require("pyarrow.parquet", "trial")
    arrays: list[np.ndarray] = []
    labels: list[Any] = []
    classes: tuple[str, ...] = ()
    for path in files:
        try:
            schema = parquet.read_schema(path)
            for column in (image, label):
                if column not in schema.names:
                    raise UsageError(
                        f"{path} has no column {column!r}; it has: {', '.join(schema.names)} (--image, --label)"
                    )
            table = parquet.read_table(path, columns=list(dict.fromkeys((image, label))))
            table = table.slice(0, None if limit is None else limit - len(arrays))
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read {path}: {summary(error)}") from None
        classes = classes or _names_in(schema.metadata, label)
        for row, cell in enumerate(table[image].to_pylist()):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise UsageError(
                    f"{path}: column {image!r} holds no image in row {row}; --image names another"
                )
            arrays.append(_decoded(io.BytesIO(content), f"{path}, row {row}", size))
        labels += table[label].to_pylist()
    if not arrays:
        raise UsageError(f"{', '.join(map(str, files))}: no rows")
    where = f"column {label!r}"
    if all(isinstance(value, str) for value in labels):
        classes = classes or tuple(sorted(set(labels)))
        labels = [classes.index(value) if value in classes else -1 for value in labels]
    if not all(isinstance(value, int) for value in labels):
        raise UsageError(f"{where} must hold whole numbers or texts; --label names another column")
    return Labelled(_stacked(arrays), _checked(torch.tensor(labels), where), classes)


def read_folders(folder: Path, size: int | None) -> Labelled:
    """Read images that lie in a folder a class, classes and files in the order of their names.

    Raises:
        UsageError: If there are none, or one cannot be read.
        MissingDependencyError: Without Pillow.
    """
    files = {
        entry.name: sorted(path for path in entry.rglob("*") if path.suffix.lower() in IMAGE_FILES)
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
    }
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise UsageError(
            f"{folder} holds neither Parquet files nor images in a folder a class, e.g. {folder}/cat/1.png"
        )
    arrays = [_decoded(path, str(path), size) for paths in files.values() for path in paths]
    labels = torch.repeat_interleave(torch.tensor([len(paths) for paths in files.values()]))
    return Labelled(_stacked(arrays), labels, tuple(files))


def _checked(labels: Tensor, where: str) -> Tensor:
    if int(labels.min()) < 0:
        index = int(labels.argmin())
        raise UsageError(f"{where} has {int(labels[index])} at {index}; classes are numbered from 0")
    return labels


def _names_in(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Names of the classes that the `datasets` library leaves in a file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _decoded(file: Any, where: str, size: int | None) -> np.ndarray:
    """Return an image as uint8 `(H, W)` or `(H, W, 3)`; scaled to a square, what juts out is cut off evenly."""
    images, operations = require("PIL.Image", "trial"), require("PIL.ImageOps", "trial")
    try:
        with images.open(file) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{where} is no readable image: {summary(error)}") from None
    return np.asarray(image if size is None else operations.fit(image, (size, size)))


def _stacked(arrays: Iterable[np.ndarray]) -> Tensor:
    arrays = list(arrays)
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, 2) for array in arrays]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        (low, *_), (high, *_) = (f(shapes) for f in (sorted, lambda s: sorted(s, reverse=True)))
        raise UsageError(
            f"images differ in size, {low[1]}x{low[0]} to {high[1]}x{high[0]}; --size scales them, e.g. --size 32"
        )
    pixels = torch.from_numpy(np.stack(arrays))
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
