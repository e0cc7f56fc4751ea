"""What the fingerprints of the built-in tasks are made of."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from torch import Tensor


def digest(*parts: object) -> str:
    """SHA-256, in hex, of tensors (shape, dtype, bytes) and of the `repr` of everything else.

    Example:
        >>> import torch
        >>> digest("a", torch.zeros(2)) == digest("a", torch.zeros(2))
        True
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
        False
    """
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            state.update(f"{tuple(part.shape)}{part.dtype}\0".encode())
            state.update(part.detach().cpu().contiguous().flatten().numpy().data)
        else:
            state.update(f"{part!r}\0".encode())
    return state.hexdigest()


@functools.cache
def code_digest() -> str:
    """SHA-256 of the source of `weightlab.tasks`, all of it: the pieces lean on one another."""
    root = Path(__file__).parent
    return digest(
        *((path.relative_to(root).as_posix(), path.read_bytes()) for path in sorted(root.rglob("*.py")))
    )
