"""Which tensors of a checkpoint are layers, and as which matrices they are read."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from weightlab.exceptions import UsageError
from weightlab.inspect.checkpoint import Checkpoint
from weightlab.inspect.fused_projections import FusedProjection, fused_projection

Kind = Literal["matrix", "conv", "delta"]

# Kernels are short in each direction; other tensors of three dimensions are stacks of matrices, as of experts.
_LONGEST_KERNEL = 32
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")


@dataclass(frozen=True)
class Layer:
    """One weight to read.

    Attributes:
        name: Its name in the checkpoint, with `[q]`, `[k]`, `[v]` for parts of a fused one and `[0]`, `[1]`, ... for
            matrices of a stack; for a LoRA, the name of the layer it changes.
        kind: `"matrix"`, `"conv"` (a kernel) or `"delta"` (the change that a LoRA makes).
        shape: Shape of the weight.
        dtype: Type it is stored in; None for types that PyTorch does not have.
        load: Gives the weight. For a delta: a small matrix with the same singular values, but for zeros.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Tensor] = field(repr=False, compare=False)


def walk_layers(
    checkpoint: Checkpoint, *, layers: Sequence[str] | None = None, split_qkv: bool = False
) -> Iterator[Layer]:
    """List the layers of a checkpoint in its order, without loading them.

    Layers are floating-point tensors of at least two dimensions. Those of three dimensions or more are kernels if
    they are at most 32 long in each dimension beyond the second; else those of three are stacks of matrices, and
    others are left out. A folder with a LoRA has the changes `scaling · B A`.

    Args:
        checkpoint: Where to look.
        layers: Patterns of names, as `"*.attn.*"` (`fnmatch`); a layer that matches any is taken. Default: all.
        split_qkv: Whether to read fused projections as three; see
            [`fused_projection`][weightlab.inspect.fused_projection] for which are known.

    Raises:
        UsageError: If an adapter is no LoRA, or a factor has no partner; if no layer matches `layers`.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> [(layer.name, layer.kind, layer.shape) for layer in walk_layers(Checkpoint(model))]
        [('0.weight', 'conv', (4, 3, 3, 3)), ('2.weight', 'matrix', (2, 16))]
    """
    all_layers = (
        _deltas(checkpoint) if checkpoint.adapter_config is not None else _weights(checkpoint, split_qkv)
    )
    found = False
    for layer in all_layers:
        if layers is None or any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in layers):
            found = True
            yield layer
    if layers is not None and not found:
        raise UsageError(
            f"no layer of {checkpoint.source} matches {', '.join(layers)}; names are like {next(iter(checkpoint))}"
        )


def _weights(checkpoint: Checkpoint, split_qkv: bool) -> Iterator[Layer]:
    for name, (shape, dtype) in checkpoint.infos.items():
        if len(shape) < 2 or 0 in shape or (dtype is not None and not dtype.is_floating_point):
            continue
        if len(shape) == 2:
            fused = fused_projection(name, shape, checkpoint.config) if split_qkv else None
            if fused is not None:
                yield from _parts(checkpoint, name, shape, dtype, fused)
            else:
                yield Layer(name, "matrix", shape, dtype, _whole(checkpoint, name))
        elif max(shape[2:]) <= _LONGEST_KERNEL:
            yield Layer(name, "conv", shape, dtype, _whole(checkpoint, name))
        elif len(shape) == 3:
            for index in range(shape[0]):
                yield Layer(f"{name}[{index}]", "matrix", shape[1:], dtype, _row(checkpoint, name, index))


def _whole(checkpoint: Checkpoint, name: str) -> Callable[[], Tensor]:
    return lambda: checkpoint[name]


def _row(checkpoint: Checkpoint, name: str, index: int) -> Callable[[], Tensor]:
    return lambda: checkpoint.row(name, index)


def _parts(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None,
    fused: FusedProjection,
) -> Iterator[Layer]:
    for index, letter in enumerate("qkv"):
        cut = list(shape)
        cut[fused.side] = fused.groups * fused.sizes[index]

        def load(index: int = index) -> Tensor:
            return fused.part(checkpoint[name], index)

        yield Layer(f"{name}[{letter}]", "matrix", tuple(cut), dtype, load)


def _deltas(checkpoint: Checkpoint) -> Iterator[Layer]:
    config: Mapping[str, object] = checkpoint.adapter_config or {}
    if config.get("peft_type") != "LORA":
        raise UsageError(
            f"{checkpoint.source} holds an adapter of type {config.get('peft_type')}, not a LoRA"
        )
    if config.get("use_dora"):
        raise UsageError(
            f"{checkpoint.source} was trained with DoRA, whose change of a weight depends on the weight; merge it into its "
            "base and read that"
        )
    factors: dict[str, dict[str, str]] = {}
    for name in checkpoint:
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = name
    if not factors:
        raise UsageError(f"{checkpoint.source} holds no LoRA: no tensor is named lora_A or lora_B")
    for key, names in factors.items():
        embedding = "embedding_A" in names or "embedding_B" in names
        down, up = (names.get(f"embedding_{letter}" if embedding else letter) for letter in "AB")
        if down is None or up is None:
            raise UsageError(
                f"{checkpoint.source}: {key} has only one of its factors: {', '.join(names.values())}"
            )
        A, B = checkpoint.infos[down], checkpoint.infos[up]
        if A.shape[0] != B.shape[1]:
            raise UsageError(f"{checkpoint.source}: the factors of {key} do not fit: {B.shape} and {A.shape}")
        scaling = _scaling(config, key, A.shape[0])

        def load(down: str = down, up: str = up, scaling: float = scaling) -> Tensor:
            # ‖(BA)‖ by singular values: those of R_B R_Aᵀ, of the size of the rank.
            right = torch.linalg.qr(checkpoint[down].double().flatten(1).mT, mode="r").R
            left = torch.linalg.qr(checkpoint[up].double().flatten(1), mode="r").R
            return scaling * left @ right.mT

        yield Layer(key, "delta", (B.shape[0], *A.shape[1:]), A.dtype, load)


def _scaling(config: Mapping[str, object], key: str, rank: int) -> float:
    alpha = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    for pattern, value in (patterns if isinstance(patterns, Mapping) else {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", key):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise UsageError(f"the adapter's config has no lora_alpha for {key}")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
