"""Loading the model that `weightlab adapt` works on."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlab._hub import first_line, hub_answers, local_copy
from weightlab._lazy import require
from weightlab.exceptions import UsageError

BLOCK_SIZE = 512
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_model(name: str, *, tokenizer: str | None = None, bf16: bool = False) -> tuple[nn.Module, Any]:
    """Load a causal language model and its tokenizer.

    Weights come from safetensors, or from a `.bin` that holds nothing but tensors; code from repositories is not run.

    Args:
        name: Folder, or id on the Hugging Face Hub, which is looked for in the folder `WEIGHTLAB_DATA` first.
        tokenizer: The same for the tokenizer. Default: the model's.
        bf16: Whether to load weights in bfloat16 rather than float32.

    Raises:
        UsageError: If there is no such model or tokenizer, or one of them cannot be loaded.
    """
    transformers = require("transformers", "adapters")
    source = _source(name)
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise UsageError(f"{name} has no config.json, so it is not the folder of a model")
    try:
        words = transformers.AutoTokenizer.from_pretrained(
            source if tokenizer is None else _source(tokenizer)
        )
    except Exception as error:  # Whatever lies beneath: OSError, ValueError, httpx, tokenizers' own.
        raise UsageError(
            f"no tokenizer in {tokenizer or name}: {first_line(error)}\nSave one there, or name one with --tokenizer"
        ) from error
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{name} has its weights in a pickle that holds more than tensors, which is not loaded; "
            "convert it to safetensors"
        ) from error
    except Exception as error:
        raise UsageError(f"cannot load {name} as a causal language model: {first_line(error)}") from error
    model.config.use_cache = False
    model.name_or_path = name  # What the adapter will name as its base.
    return model, words


def _source(name: str) -> str:
    """Return what transformers is to load: a folder, or an id if the Hub answers."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists() or not _REPOSITORY.fullmatch(name):
            raise UsageError(
                f"no folder {name} (looked in {Path.cwd()}); models on the Hub are named owner/name"
            )
        folder = local_copy(name)
        if folder is None and hub_answers():
            return name
        path = folder or _cached(name)
    if (path / "adapter_config.json").exists():
        raise UsageError(
            f"{name} is an adapter; give the model that it belongs to, or merge it into that first"
        )
    return str(path)


def _cached(name: str) -> Path:
    try:
        return Path(require("huggingface_hub", "adapters").snapshot_download(name, local_files_only=True))
    except Exception as error:
        raise UsageError(
            f"no model {name}: there is no such folder here or in WEIGHTLAB_DATA, the Hugging Face Hub does not "
            "answer, and its cache has no copy"
        ) from error


def block_size_for(model: nn.Module, wanted: int | None) -> int:
    """Choose the number of tokens in a block.

    Raises:
        UsageError: If more are wanted than the model has positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if wanted is None:
        return min(BLOCK_SIZE, limit or BLOCK_SIZE)
    if limit and wanted > limit:
        raise UsageError(
            f"block_size {wanted} is more than the model's {limit} positions; lower --block-size"
        )
    return wanted


def check_vocabulary(tokens: Tensor, model: nn.Module) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UsageError: If not: the tokenizer is not the model's.
    """
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if int(tokens.max()) >= known:
        raise UsageError(
            f"the tokenizer gives token {int(tokens.max())}, but the model knows {known}; name its own with --tokenizer"
        )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers from drawing bars and printing hints while the block runs, and PEFT from old names of its."""
    logging = require("transformers.utils.logging", "adapters")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is deprecated and will be removed in v6", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
