"""A budget of ranks, dealt to the layers whose components explain most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def allocate_ranks(
    ratios: Mapping[str, Iterable[float]],
    budget: int,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int]:
    """Deal a budget of ranks over layers by the shares of variance that their components explain.

    The `budget` largest ratios of all layers are taken; a layer's rank is how many of them are its own. Of
    equal ratios, those of the layer named first are taken, so within a group ranks differ by at most one.

    Args:
        ratios: Explained-variance ratios by layer, or by input where layers share one; each in descending
            order. No layer gets a higher rank than it has ratios.
        budget: Sum of all ranks.
        groups: Layers that are fed by each input. Each of them counts the input's ratios again. Default None:
            names in `ratios` are layers.

    Returns:
        Rank of each layer, which may be 0, in the order of `ratios` and `groups`.

    Raises:
        ValueError: If the budget is negative or larger than the number of ratios, a ratio is negative, not
            finite or larger than the one before it, or `groups` and `ratios` name different inputs.

    Complexity:
        Sorting all ratios.

    References:
        Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170.

    Example:
        >>> allocate_ranks({"a": [0.6, 0.3, 0.05], "b": [0.4, 0.35, 0.2]}, budget=4)
        {'a': 2, 'b': 2}
        >>> allocate_ranks({"x": [0.9, 0.1], "y": [0.5, 0.2]}, 3, {"x": ["query", "key"], "y": ["out"]})
        {'query': 1, 'key': 1, 'out': 1}
    """
    lists = {name: [float(ratio) for ratio in column] for name, column in ratios.items()}
    for name, column in lists.items():
        if not all(math.isfinite(ratio) and ratio >= 0 for ratio in column):
            raise ValueError(f"ratios of {name!r} must be finite and not negative, got {column}")
        if column != sorted(column, reverse=True):
            raise ValueError(f"ratios of {name!r} must be in descending order, got {column}")
    if groups is None:
        groups = {name: [name] for name in lists}
    if set(groups) != set(lists):
        raise ValueError(f"groups must name the inputs in ratios, {sorted(lists)}, got {sorted(groups)}")
    layers = [(layer, lists[name]) for name in lists for layer in groups[name]]
    offers = [(ratio, layer) for layer, column in layers for ratio in column]
    if not 0 <= budget <= len(offers):
        raise ValueError(f"budget must be in [0, {len(offers)}], the number of components, got {budget}")
    ranks = {layer: 0 for layer, _ in layers}
    for _, layer in sorted(offers, key=lambda offer: -offer[0])[:budget]:
        ranks[layer] += 1
    return ranks
