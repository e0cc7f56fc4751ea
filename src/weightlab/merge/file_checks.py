"""Whether networks in files can be merged: same tensors, in formats that can be averaged, all finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weightlab.exceptions import UsageError, WeightlabError
from weightlab.merge.stored_weights import StoredWeights


def compare_architectures(models: Sequence[StoredWeights]) -> list[str]:
    """Check that all have the same tensors; return what is worth a word."""
    first, notes = models[0], []
    for name, info in first.tensors.infos.items():
        if info.dtype is None or (info.dtype.is_floating_point and info.dtype.itemsize == 1):
            raise UsageError(
                f"{name} of {first.path} is in an 8-bit or unknown format, whose scales do not average; convert it to "
                "bfloat16 first"
            )
    for other in models[1:]:
        mine, theirs = first.tensors.infos, other.tensors.infos
        for name in [*mine, *theirs]:
            if name not in theirs or name not in mine:
                has, lacks = (first, other) if name in mine else (other, first)
                shape = has.tensors.infos[name].shape
                raise UsageError(
                    f"different architectures: {name}, of shape {shape}, is in {has.path}, but not in {lacks.path}"
                )
            if mine[name].shape != theirs[name].shape:
                raise UsageError(
                    f"different architectures: {name} has shape {mine[name].shape} in {first.path}, but "
                    f"{theirs[name].shape} in {other.path}"
                )
        kinds = {name: (info.dtype, theirs[name].dtype) for name, info in mine.items()}
        for name, (a, b) in kinds.items():
            if a is None or b is None or a.is_floating_point != b.is_floating_point:
                raise UsageError(
                    f"{name} is {a} in {first.path}, but {b} in {other.path}: one of them is quantized"
                )
        if unlike := [name for name, (a, b) in kinds.items() if a != b]:
            a, b = kinds[unlike[0]]
            notes.append(
                f"{other.path} stores {len(unlike)} tensors in another dtype ({unlike[0]}: {b}); the merged model has "
                f"that of {first.path} ({a})"
            )
    return notes


def finite_tensor(stored: StoredWeights, name: str) -> Tensor:
    """Read a tensor. Raises WeightlabError, naming it, if an entry is not finite."""
    tensor = stored.tensors[name]
    if not _finite(tensor):
        raise _not_finite(tensor, stored.path, name)
    return tensor


def floating_tensors(models: Sequence[StoredWeights], name: str) -> list[Tensor] | None:
    """Read a tensor of each model; None if all have the same infinities, as saved attention masks do.

    Raises WeightlabError, naming the tensor, if an entry is not finite otherwise.
    """
    tensors = [model.tensors[name] for model in models]
    for model, tensor in zip(models, tensors, strict=True):
        if not _finite(tensor):
            if all(torch.equal(tensors[0], other) for other in tensors):
                return None
            raise _not_finite(tensor, model.path, name)
    return tensors


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # A sum is one pass, and finite only if all entries are.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite() or tensor.isfinite().all())


def _not_finite(tensor: Tensor, path: str, name: str) -> WeightlabError:
    bad = int((~tensor.isfinite()).sum())
    entries = "entry that is" if bad == 1 else "entries that are"
    return WeightlabError(f"{name} of {path} has {bad} {entries} not finite; nothing was written")


def refuse_quantized(name: str, models: Sequence[StoredWeights]) -> None:
    """Integers are counts and masks as a rule, and taken from the first; large ones that differ are weights in disguise."""
    if len(models[0].tensors.infos[name].shape) < 2:
        return
    tensor = models[0].tensors[name]
    for other in models[1:]:
        if not torch.equal(tensor, other.tensors[name]):
            raise UsageError(
                f"{name} holds integers that differ between {models[0].path} and {other.path}, as quantized weights do; "
                "convert the models to bfloat16 first"
            )
