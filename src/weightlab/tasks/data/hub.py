"""Where a repository's files are: under `WEIGHTLAB_DATA`, or on the Hugging Face Hub."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from weightlab._lazy import require
from weightlab.exceptions import TaskError

PROBE_SECONDS = 5.0


def local_repository(repository: str) -> Path | None:
    """Return `$WEIGHTLAB_DATA/<repository>` if that folder exists."""
    root = os.environ.get("WEIGHTLAB_DATA")
    folder = Path(root).expanduser() / repository if root else None
    return folder if folder is not None and folder.is_dir() else None


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
    folder = local_repository(repository)
    if folder is not None:
        files = sorted(folder.glob(pattern))
        if not files:
            raise TaskError(f"{folder} has no {pattern}; put the file there, or unset WEIGHTLAB_DATA")
        return files
    if on_hub:
        for revision, form in (
            (None, pattern),
            # Where a repository holds a loading script, the Hub keeps converted files on this branch.
            ("refs/convert/parquet", f"{config or 'default'}/{split}/*.parquet"),
        ):
            snapshot = _snapshot(repository, form, revision)
            files = sorted(snapshot.glob(form)) if snapshot else []
            if files:
                return files
    raise missing(repository, on_hub=on_hub)


def model_file(repository: str) -> Path:
    """Find `model.safetensors` of a model repository.

    Raises:
        TaskError: When neither `WEIGHTLAB_DATA` nor the Hub (or its cache, offline) has it.
        MissingDependencyError: When the Hub is needed and `huggingface_hub` is not installed.
    """
    folder = local_repository(repository)
    if folder is not None:
        file = folder / "model.safetensors"
        if not file.is_file():
            raise TaskError(f"{folder} has no model.safetensors; put it there, or unset WEIGHTLAB_DATA")
        return file
    hub = require("huggingface_hub", "trial")
    try:
        return Path(
            hub.hf_hub_download(repository, "model.safetensors", local_files_only=not hub_reachable())
        )
    except _hub_errors(hub):
        raise missing(repository) from None


def missing(repository: str, *, on_hub: bool = True) -> TaskError:
    """Build the error for data that are in neither place, naming both ways to get them."""
    root = os.environ.get("WEIGHTLAB_DATA")
    tried = f"not in WEIGHTLAB_DATA={root}" if root else "WEIGHTLAB_DATA is not set"
    if not on_hub:
        return TaskError(
            f"no data for {repository}: {tried}, and the Hugging Face Hub does not have it.\n"
            f"Set WEIGHTLAB_DATA to a folder that contains {repository}/."
        )
    state = "the Hub has no such files" if hub_reachable() else "the Hub is offline and its cache has no copy"
    return TaskError(
        f"no data for {repository}: {tried}; {state}.\n"
        f"Set WEIGHTLAB_DATA to a folder that contains {repository}/, or connect to huggingface.co."
    )


@functools.cache
def hub_reachable() -> bool:
    """Whether the Hub answers, asked once a process and within `PROBE_SECONDS`.

    Its client would retry for half a minute before giving up. `HF_HUB_OFFLINE` is obeyed.
    """
    hub = require("huggingface_hub", "trial")
    if hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        hub.get_session().head(hub.constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:
        return False
    return True


def _snapshot(repository: str, pattern: str, revision: str | None) -> Path | None:
    hub = require("huggingface_hub", "trial")
    try:
        return Path(
            hub.snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[pattern],
                local_files_only=not hub_reachable(),
            )
        )
    except _hub_errors(hub):
        return None


def _hub_errors(hub: Any) -> tuple[type[Exception], ...]:
    return (OSError, ValueError, hub.errors.HfHubHTTPError, hub.errors.HFValidationError)
