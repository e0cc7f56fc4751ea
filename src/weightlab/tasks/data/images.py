"""Image data sets in the Hub's layout: Parquet with encoded image files and labels."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weightlab._lazy import require
from weightlab.exceptions import TaskError
from weightlab.tasks.data.cache import TensorCache
from weightlab.tasks.data.hub import parquet_files


class Images(NamedTuple):
    """Decoded images and their classes.

    Attributes:
        pixels: uint8 `[n, channels, height, width]`.
        labels: int64 `[n]`.
    """

    pixels: Tensor
    labels: Tensor


@functools.cache
def load_images(
    repository: str, config: str, split: str, *, column: str = "image", limit: int | None = None
) -> Images:
    """Read images of a split, in the data set's order.

    A whole split is decoded once (CIFAR-10's 50,000 training images take 5 s on one core) and
    kept under `cache_folder()`; with `limit`, only that many are decoded and nothing is written. Kept in
    memory for the life of the process.

    Args:
        repository: Repository id, e.g. `"uoft-cs/cifar10"`.
        config: Folder inside the repository, e.g. `"plain_text"`.
        split: `"train"` or `"test"`.
        column: Column of the images; the labels' is `label`.
        limit: Read the first `limit` images only.

    Raises:
        TaskError: When the data are in neither place, or the files are not such images.
    """
    cache = _cache(repository, config, split, column)
    if limit is None or cache.path.exists():
        tensors = cache.tensors()
        return Images(tensors["pixels"][:limit], tensors["labels"][:limit])
    return _decode(tuple(parquet_files(repository, config, split)), column, limit)


def images_fingerprint(repository: str, config: str, split: str, *, column: str = "image") -> str:
    """SHA-256 of a split's decoded pixels and labels; decodes them if no cache has it.

    Raises:
        TaskError: As `load_images`.
    """
    return _cache(repository, config, split, column).fingerprint()


def _cache(repository: str, config: str, split: str, column: str) -> TensorCache:
    files = tuple(parquet_files(repository, config, split))
    name = f"{repository}/{split}".replace("/", "--")
    return TensorCache(name, files, lambda: _decode(files, column)._asdict())


def _decode(files: Sequence[Path], column: str, limit: int | None = None) -> Images:
    parquet, image_module = require("pyarrow.parquet", "trial"), require("PIL.Image", "trial")
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    for path in files:
        try:
            table = parquet.read_table(path, columns=[column, "label"])
            table = table.slice(0, None if limit is None else limit - len(arrays))
            for image in table[column].combine_chunks().field("bytes"):
                arrays.append(np.asarray(image_module.open(io.BytesIO(image.as_py()))))
            labels += table["label"].to_pylist()
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise TaskError(f"{path} holds no readable images in column {column!r}: {error}") from error
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), torch.tensor(labels))
