"""Repositories by their ids: in the folder `WEIGHTLAB_DATA`, or on the Hugging Face Hub."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from weightlab._lazy import require

PROBE_SECONDS = 5.0


def local_copy(repository: str) -> Path | None:
    """Return `$WEIGHTLAB_DATA/<repository>` if there is such a folder.

    Example:
        >>> local_copy("no-such-owner/no-such-name") is None
        True
    """
    root = os.environ.get("WEIGHTLAB_DATA")
    folder = Path(root).expanduser() / repository if root else None
    return folder if folder is not None and folder.is_dir() else None


@functools.cache
def hub_answers(extra: str = "adapters") -> bool:
    """Whether the Hub answers within `PROBE_SECONDS`, asked once a process; its clients would retry for a minute.

    `HF_HUB_OFFLINE` is obeyed.

    Args:
        extra: Which of weightlab's extras brings `huggingface_hub`, for the error if it is missing.
    """
    hub, constants = require("huggingface_hub", extra), require("huggingface_hub.constants", extra)
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        hub.get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where there is none.

    Example:
        >>> first_line(ValueError("one\\ntwo")), first_line(ValueError())
        ('one', 'ValueError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
