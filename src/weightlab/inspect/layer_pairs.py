"""Which layers of two checkpoints belong together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from weightlab.exceptions import UsageError
from weightlab.inspect.checkpoint import Checkpoint
from weightlab.inspect.layers import Layer, walk_layers

# Tables of tokens, of which a fine-tuned model may have more rows.
_TOKENS = re.compile(r"embed|wte|lm_head|shared|tok", re.IGNORECASE)


class Pair(NamedTuple):
    """A layer before and after, and the rows that each had if they were cut to those in both."""

    before: Layer
    after: Layer
    rows: tuple[int, int] | None = None


class Pairing(NamedTuple):
    """Which layers of two checkpoints belong together, and which have no partner.

    Attributes:
        pairs: Layers before and after, in the order of the first checkpoint.
        only_before: Names of layers that the second lacks.
        only_after: Names of layers that the first lacks.
        shapes_differ: Name -> shapes before and after, of layers that cannot be compared.
    """

    pairs: tuple[Pair, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    shapes_differ: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def pair_layers(
    before: Checkpoint,
    after: Checkpoint,
    *,
    layers: Sequence[str] | None = None,
    split_qkv: bool = False,
) -> Pairing:
    """Find the layers that two checkpoints have in common, without loading them.

    Args:
        before: The first.
        after: The second.
        layers: Patterns of names in the first; see [`walk_layers`][weightlab.inspect.walk_layers].
        split_qkv: Whether to read fused projections as three.

    Raises:
        UsageError: If one is an adapter, or no layer is in both.

    Example:
        >>> import torch
        >>> base = {"h.0.weight": torch.ones(3, 2), "wte": torch.ones(5, 2)}
        >>> tuned = {"transformer.h.0.weight": torch.ones(3, 2), "transformer.wte": torch.ones(6, 2)}
        >>> [pair.before.shape for pair in pair_layers(Checkpoint(base), Checkpoint(tuned)).pairs]
        [(3, 2), (5, 2)]
    """
    for checkpoint in (before, after):
        if checkpoint.adapter_config is not None:
            raise UsageError(
                f"{checkpoint.source} is an adapter, which has no weights to compare; inspect it alone for the spectra of its "
                "changes, or merge it into its base first (weightlab merge-adapters --method sum)"
            )
    firsts = {layer.name: layer for layer in walk_layers(before, layers=layers, split_qkv=split_qkv)}
    seconds = {layer.name: layer for layer in walk_layers(after, split_qkv=split_qkv)}
    partners = _partners(firsts, seconds)
    pairs, differ = [], {}
    for name, layer in firsts.items():
        if name not in partners:
            continue
        other = seconds[partners[name]]
        if (pair := _pair(layer, other)) is None:
            differ[name] = (layer.shape, other.shape)
        else:
            pairs.append(pair)
    if not pairs:
        raise UsageError(
            f"no layer of {before.source} is in {after.source} with the same name and shape: they have "
            f"{_example(firsts)} and {_example(seconds)}"
        )
    matched = set(partners.values())
    # With a selection, what else the second has was not asked for.
    only_after = [] if layers is not None else [name for name in seconds if name not in matched]
    only_before = [name for name in firsts if name not in partners]
    return Pairing(tuple(pairs), tuple(only_before), tuple(only_after), differ)


def _example(layers: Mapping[str, Layer]) -> str:
    layer = next(iter(layers.values()), None)
    return "no layers" if layer is None else f"{layer.name} {'×'.join(map(str, layer.shape))}"


def _pair(first: Layer, second: Layer) -> Pair | None:
    if first.kind != second.kind:
        return None
    if first.shape == second.shape:
        return Pair(first, second)
    if first.shape[1:] != second.shape[1:] or len(first.shape) != 2 or not _TOKENS.search(first.name):
        return None
    rows = min(first.shape[0], second.shape[0])
    return Pair(_cut(first, rows), _cut(second, rows), (first.shape[0], second.shape[0]))


def _cut(layer: Layer, rows: int) -> Layer:
    return dataclasses.replace(layer, shape=(rows, *layer.shape[1:]), load=lambda: layer.load()[:rows])


def _partners(firsts: Collection[str], seconds: Collection[str]) -> dict[str, str]:
    """Names before -> after: equal ones, and those equal but for a first part that all the others lack."""
    ways = [("", "")]
    ways += [(part, "") for part in sorted({f"{name.partition('.')[0]}." for name in firsts})]
    ways += [("", part) for part in sorted({f"{name.partition('.')[0]}." for name in seconds})]

    def found(ours: str, theirs: str) -> dict[str, str]:
        moved = {name: theirs + name.removeprefix(ours) for name in firsts if name.startswith(ours)}
        return {name: other for name, other in moved.items() if other in seconds}

    best = max((found(*way) for way in ways), key=len)
    equal = {name: name for name in firsts if name in seconds}
    taken = set(equal.values())
    return equal | {name: other for name, other in best.items() if name not in equal and other not in taken}
