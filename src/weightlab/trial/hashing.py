"""Hashes that prove pairing: equal initial weights, equal data order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLE = 1024


def derive_seed(seed: int, purpose: str) -> int:
    """Derive an independent 63-bit seed for one purpose from a run's seed.

    Example:
        >>> derive_seed(0, "data") == derive_seed(0, "data") != derive_seed(0, "weights")
        True
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()) >> 1


def _buffer(tensor: Tensor) -> Any:
    data = tensor.detach().to("cpu").contiguous()
    try:
        return data.numpy()
    except TypeError:  # a dtype that NumPy lacks, such as bfloat16
        return data.reshape(-1).view(torch.uint8).numpy()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, dtypes, shapes and every byte of the tensors, in name order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_buffer(tensor))
    return digest.hexdigest()


class BatchHash:
    """Running hash over training batches, cheap enough for every step.

    Of a large tensor every n-th element enters, about 1024 in all, besides its shape and dtype;
    small ones enter whole. Batches may be tensors or nested tuples, lists and dicts of them.

    Example:
        >>> a, b = BatchHash(), BatchHash()
        >>> a.update((torch.arange(3), {"x": torch.ones(2)}))
        >>> b.update((torch.arange(3), {"x": torch.zeros(2)}))
        >>> a.hexdigest() == b.hexdigest()
        False
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._forms: set[tuple[torch.dtype, torch.Size]] = set()

    def update(self, batch: Any) -> None:
        """Add one batch."""
        if isinstance(batch, Tensor):
            self._add(batch)
        elif isinstance(batch, (list, tuple)):
            for value in batch:
                self.update(value)
        elif isinstance(batch, Mapping):
            for name, value in batch.items():
                self._digest.update(str(name).encode())
                self.update(value)
        else:
            self._digest.update(repr(batch).encode())

    def _add(self, tensor: Tensor) -> None:
        form = (tensor.dtype, tensor.shape)
        if form not in self._forms:
            self._forms.add(form)
            self._digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel() > 2 * SAMPLE:
            tensor = tensor.flatten()[:: tensor.numel() // SAMPLE]
        try:
            # A plain contiguous CPU tensor, the usual case, needs no preparation.
            plain: Any = tensor.numpy()
            self._digest.update(plain)
        except (TypeError, ValueError, RuntimeError):
            self._digest.update(_buffer(tensor))

    def hexdigest(self) -> str:
        """Hash of all batches so far."""
        return self._digest.hexdigest()
