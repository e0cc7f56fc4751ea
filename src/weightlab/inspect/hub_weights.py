"""The weights of a repository on the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from weightlab._hub import first_line, hub_answers, local_copy
from weightlab._lazy import require
from weightlab.exceptions import UsageError

# Files that describe the weights, and in this order of preference the weights themselves.
_FACTS = ("config.json", "adapter_config.json", "*.index.json")
_WEIGHTS = (
    ("adapter_model.safetensors",),
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("*.safetensors",),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)


def hub_weights(repository: str) -> Path:
    """Return a folder with the weights of a repository: one in `WEIGHTLAB_DATA`, in the Hub's cache, or downloaded to it.

    Of several formats one is taken, safetensors first.

    Args:
        repository: Id, `owner/name`.

    Raises:
        UsageError: If there is no such repository, or it has no weights.
        MissingDependencyError: If the Hub is needed and `huggingface_hub` is not installed.
    """
    folder = local_copy(repository)
    if folder is not None:
        return folder
    hub = require("huggingface_hub", "adapters")
    try:
        if not hub_answers():
            return Path(hub.snapshot_download(repository, local_files_only=True))
        files = hub.list_repo_files(repository)
    except Exception as error:  # What lies beneath the client comes through: httpx, OSError, ValueError.
        raise UsageError(
            f"no checkpoint {repository}: there is no such file or folder here or in WEIGHTLAB_DATA, and from the Hugging "
            f"Face Hub: {first_line(error)}"
        ) from error
    weights = next(
        (found for patterns in _WEIGHTS if (found := [file for file in files if _any(file, patterns)])), None
    )
    if weights is None:
        raise UsageError(
            f"{repository} has no safetensors or .bin file at its top; download it and name a file"
        )
    facts = [file for file in files if _any(file, _FACTS)]
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=[*weights, *facts]))
    except Exception as error:
        raise UsageError(f"cannot download {repository}: {first_line(error)}") from error


def _any(file: str, patterns: tuple[str, ...]) -> bool:
    # fnmatch's * takes slashes; only the top folder is looked at.
    return "/" not in file and any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)
