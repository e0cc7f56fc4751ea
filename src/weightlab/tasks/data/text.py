"""Text data sets in the Hub's layout: a Parquet column `text`, a document a row."""

from __future__ import annotations

import functools

from torch import Tensor

from weightlab._lazy import require
from weightlab.tasks.data.alphabet import encode
from weightlab.tasks.data.hub import parquet_files


@functools.cache
def load_text(repository: str, split: str, *, config: str = "", on_hub: bool = True) -> Tensor:
    """Read a split's documents as one string of symbols, documents parted by an empty line.

    Kept in memory for the life of the process.

    Args:
        repository: Repository id, e.g. `"karpathy/tiny_shakespeare"`.
        split: `"train"`, `"validation"` or `"test"`.
        config: Folder inside the repository; by default its top.
        on_hub: Whether the Hub has the repository at all.

    Returns:
        uint8 tensor `[characters]` as `encode` makes it.

    Raises:
        TaskError: When the data are in neither place.
    """
    files = parquet_files(repository, config, split, on_hub=on_hub)
    parquet = require("pyarrow.parquet", "trial")
    documents = [
        text for path in files for text in parquet.read_table(path, columns=["text"])["text"].to_pylist()
    ]
    return encode("\n\n".join(documents))
