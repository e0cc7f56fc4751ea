"""The text that `weightlab adapt` trains on: documents from files or the Hub, cut into blocks of tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from weightlab._hub import first_line, hub_answers, local_copy
from weightlab._lazy import require
from weightlab.exceptions import UsageError

TABLES = (".jsonl", ".ndjson", ".parquet")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def read_documents(source: str, *, field: str = "text", split: str = "train") -> list[str]:
    """Read the documents of a file, a folder or a data set.

    Args:
        source: A file: `.jsonl` (an object a line) and `.parquet` have a document a row, any other file is one
            document in UTF-8. A folder: its files that end in `.txt`, `.jsonl` or `.parquet`, those of the split if
            any of their names has it. Or a data set's id on the Hugging Face Hub, `owner/name` or
            `owner/name:configuration`, which is looked for in the folder `WEIGHTLAB_DATA` first.
        field: Name of the column that holds the text.
        split: Which part of a folder or data set.

    Returns:
        Documents that hold more than white space, in the order of files and rows.

    Raises:
        UsageError: If there is nothing of that name, it cannot be read, has no such column, or no text.
        MissingDependencyError: If a Parquet file or the Hub is asked for and the package for it is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "two.jsonl")
        ...     _ = file.write_text('{"text": "one"}\\n{"text": "two"}\\n')
        ...     read_documents(str(file))
        ['one', 'two']
    """
    path = Path(source).expanduser()
    if path.is_file():
        found = _file(path, field)
    elif path.is_dir():
        found = _folder(path, field, split)
    elif _REPOSITORY.fullmatch(source) and path.suffix not in (".txt", *TABLES):
        found = _repository(source, field, split)
    else:
        raise UsageError(
            f"no file or folder {source} (looked in {Path.cwd()}); data on the Hub are named owner/name"
        )
    documents = [text for text in found if text.strip()]
    if not documents:
        raise UsageError(f"{source} holds no text")
    return documents


def _file(path: Path, field: str) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, field)
        elif path.suffix in TABLES:
            yield from _json_lines(path, field)
        else:
            yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not text in UTF-8; give .txt, .jsonl or .parquet, or convert it first"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is not JSON: {error}") from None
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UsageError(f"{path}, line {number} has no text in {field!r}{_mend(names)}")
            yield text


def _parquet(path: Path, field: str) -> Iterator[str]:
    pyarrow = require("pyarrow", "trial")
    parquet = require("pyarrow.parquet", "trial")
    try:
        file = parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise UsageError(f"{path} has no column {field!r}{_mend(', '.join(file.schema_arrow.names))}")
        for batch in file.iter_batches(columns=[field]):
            yield from _strings(batch.column(0).to_pylist(), path, field)
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path} is not a Parquet file that can be read: {error}") from None


def _strings(values: Iterable[Any], source: object, field: str) -> Iterator[str]:
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UsageError(f"{field!r} of {source} holds {type(value).__name__}, not text")
        yield value


def _mend(names: str) -> str:
    return f"; it has: {names or 'nothing'} (choose with --text-field)"


def _folder(folder: Path, field: str, split: str) -> Iterator[str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", *TABLES) and path.is_file())
    if not files:
        raise UsageError(f"{folder} holds no .txt, .jsonl or .parquet file")
    of_split = [path for path in files if split in re.split(r"[\W_]+", str(path.relative_to(folder)))]
    return chain.from_iterable(_file(path, field) for path in of_split or files)


def _repository(source: str, field: str, split: str) -> Iterator[str]:
    repository, _, configuration = source.partition(":")
    folder = local_copy(f"{repository}/{configuration}")
    if folder is not None:
        return _folder(folder, field, split)
    datasets = require("datasets", "trial")
    offline = require("huggingface_hub.constants", "trial").HF_HUB_OFFLINE
    try:
        if not (offline or hub_answers()):
            raise ConnectionError("it does not answer; with HF_HUB_OFFLINE=1 its cache is used")
        rows = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # The client lets through what lies beneath it: httpx, OSError, ValueError.
        root = os.environ.get("WEIGHTLAB_DATA")
        tried = f"WEIGHTLAB_DATA={root} has none" if root else "WEIGHTLAB_DATA is not set"
        raise UsageError(
            f"no data for {source}: there is no such file or folder here, {tried}, and from the Hugging Face Hub: "
            f"{first_line(error)}"
        ) from error
    if field not in rows.column_names:
        raise UsageError(f"{source} has no column {field!r}{_mend(', '.join(rows.column_names))}")
    return _strings(rows[field], source, field)


def tokenize(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """Turn documents into one row of tokens, each document closed by the end-of-text token if there is one.

    Args:
        documents: Texts.
        tokenizer: A transformers tokenizer; it adds at the start of each document what it is used to add.

    Returns:
        (tokens,) int64.
    """
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in documents:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
    return torch.tensor(ids, dtype=torch.int64)


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of equal length, each its own labels, as a causal language model wants them.

    Args:
        rows: (blocks, tokens) int64.

    Example:
        >>> len(Blocks(torch.zeros(3, 8, dtype=torch.int64)))
        3
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def cut(tokens: Tensor, block_size: int, eval_fraction: float) -> tuple[Blocks, Blocks]:
    """Cut a row of tokens into blocks to train on and blocks to evaluate on, the latter from its end.

    Args:
        tokens: (tokens,).
        block_size: Tokens in a block; what is left over at the end is dropped.
        eval_fraction: Share of blocks to hold out, at least one unless it is 0.

    Raises:
        UsageError: If there are not enough tokens.

    Example:
        >>> train, held_out = cut(torch.arange(50), block_size=10, eval_fraction=0.2)
        >>> len(train), held_out.rows[0, :3]
        (4, tensor([40, 41, 42]))
    """
    blocks = len(tokens) // block_size
    held_out = max(1, round(blocks * eval_fraction)) if eval_fraction else 0
    if blocks - held_out < 1:
        needed = "two blocks, one to train and one to evaluate" if eval_fraction else "one block"
        raise UsageError(
            f"the text has {len(tokens)} tokens, which is less than {needed} of {block_size}; "
            "give more text or a smaller --block-size"
        )
    rows = tokens[: blocks * block_size].view(blocks, block_size)
    return Blocks(rows[: blocks - held_out]), Blocks(rows[blocks - held_out :])
