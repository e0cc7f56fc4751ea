"""Where a repository's files are: under `WEIGHTLAB_DATA`, or on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weightlab._hub import hub_answers, local_copy
from weightlab._lazy import require
from weightlab.exceptions import TaskError
from weightlab.tasks.files import summary

NOT_ON_HUB = "the Hugging Face Hub does not have it"


def parquet_files(repository: str, config: str, split: str, *, on_hub: bool = True) -> list[Path]:
    """Find the Parquet files of one split of a data set.

    Args:
        repository: Repository id, e.g. `"uoft-cs/cifar10"`.
        config: Folder of the configuration inside the repository; `""` for its top.
        split: `"train"`, `"validation"` or `"test"` as the repository has it.
        on_hub: Whether the Hub has the repository at all.

    Raises:
        TaskError: When neither `WEIGHTLAB_DATA` nor the Hub (or its cache, offline) has it.
        MissingDependencyError: When the Hub is needed and `huggingface_hub` is not installed.
    """
    pattern = f"{config}/{split}-*.parquet" if config else f"{split}-*.parquet"
    folder = local_copy(repository)
    if folder is not None:
        files = sorted(folder.glob(pattern))
        if not files:
            raise TaskError(f"{folder} has no {pattern}; put the file there, or unset WEIGHTLAB_DATA")
        return files
    reason = NOT_ON_HUB
    if on_hub:
        for revision, form in (
            (None, pattern),
            # Where a repository holds a loading script, the Hub keeps converted files on this branch.
            ("refs/convert/parquet", f"{config or 'default'}/{split}/*.parquet"),
        ):
            try:
                snapshot = _download(
                    "snapshot_download",
                    repository,
                    repo_type="dataset",
                    revision=revision,
                    allow_patterns=[form],
                )
            except TaskError as error:
                reason = str(error)
                continue
            files = sorted(snapshot.glob(form))
            if files:
                return files
            reason = f"the Hub's copy has no {pattern}"
    raise _missing(repository, reason)


def model_file(repository: str) -> Path:
    """Find `model.safetensors` of a model repository.

    Raises:
        TaskError: When neither `WEIGHTLAB_DATA` nor the Hub (or its cache, offline) has it.
        MissingDependencyError: When the Hub is needed and `huggingface_hub` is not installed.
    """
    folder = local_copy(repository)
    if folder is not None:
        file = folder / "model.safetensors"
        if not file.is_file():
            raise TaskError(f"{folder} has no model.safetensors; put it there, or unset WEIGHTLAB_DATA")
        return file
    try:
        return _download("hf_hub_download", repository, filename="model.safetensors")
    except TaskError as error:
        raise _missing(repository, str(error)) from None


def _download(function: str, repository: str, **options: Any) -> Path:
    hub = require("huggingface_hub", "trial")
    online = hub_answers("trial")
    try:
        return Path(getattr(hub, function)(repository, local_files_only=not online, **options))
    except Exception as error:  # The client lets through what lies beneath it: httpx, OSError, ValueError.
        state = (
            f"the Hub answered {summary(error)}" if online else "the Hub is offline, its cache has no copy"
        )
        raise TaskError(state) from error


def _missing(repository: str, reason: str) -> TaskError:
    root = os.environ.get("WEIGHTLAB_DATA")
    tried = f"WEIGHTLAB_DATA={root} does not contain it" if root else "WEIGHTLAB_DATA is not set"
    other = "" if reason == NOT_ON_HUB else ", or connect to huggingface.co"
    return TaskError(
        f"no data for {repository}: {tried}; {reason}.\n"
        f"Set WEIGHTLAB_DATA to a folder that contains {repository}/{other}."
    )
