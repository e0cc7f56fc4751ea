"""Which axes of which tensors must be permuted together for a network to stay the same function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Axis = str | None | tuple[str | int, ...]
Factors = tuple[tuple[str | None, int], ...]


class PermutationSpec:
    """Groups of axes that share one permutation, as a table ``{tensor: (axis, axis, ...)}``.

    Each axis is one of

    - ``None``: stays as it is, as inputs and outputs do;
    - ``"name"``: permuted by the group of that name;
    - a tuple, for an axis that is a product of several, outermost first: group names, and integers for fixed
      factors. ``("conv2", 49)`` is a dense layer's input after flattening channels of 7×7 pixels,
      ``(3, "heads", 64)`` a fused projection to queries, keys and values.

    Tensors that the table leaves out stay as they are. `from_model` writes the table for a model.

    Args:
        axes: The table.
        sizes: Sizes of groups, ``{group: size}``. Only needed for those that never stand alone in an axis with
            factors of known size. Default None.

    Raises:
        TypeError: If an axis is none of the above.
        ValueError: If a group appears twice on one tensor, where coordinate descent does not apply, or `sizes`
            names a group that no tensor has.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051.

    Example:
        >>> spec = PermutationSpec({
        ...     "0.weight": ("hidden", None), "0.bias": ("hidden",), "2.weight": (None, "hidden")
        ... })
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec.group_sizes(model.state_dict())
        {'hidden': 8}
    """

    def __init__(self, axes: Mapping[str, Sequence[Axis]], *, sizes: Mapping[str, int] | None = None) -> None:
        self.axes: dict[str, tuple[Axis, ...]] = {name: tuple(entry) for name, entry in axes.items()}
        self.sizes = dict(sizes or {})
        groups: set[str] = set()
        for name, entry in self.axes.items():
            found = [part for axis in entry for part in _parts(name, axis) if isinstance(part, str)]
            for group in found:
                if found.count(group) > 1:
                    raise ValueError(
                        f"{name} has group {group!r} on two axes; a permutation may act on a tensor once: "
                        "set one axis to None, and the group's others with it"
                    )
            groups.update(found)
        if unknown := sorted(self.sizes.keys() - groups):
            raise ValueError(f"sizes names {unknown[0]!r}, a group that no tensor has")
        self.groups: tuple[str, ...] = tuple(sorted(groups))

    @classmethod
    def from_model(cls, model: nn.Module, *example: Any) -> PermutationSpec:
        """Infer the table by running the model once on an example batch.

        The operations of the forward pass say which axes meet: what is added must be permuted alike, so residual
        streams become one group; norms follow their channels; a flattened channel is a block; heads of an
        attention are a group of blocks, with another, shared by all heads, for the entries within.
        Channels of grouped convolutions are products in the same way. Whatever goes through an operation that is
        not known to commute with permutations stays fixed, which is always right, though it may be more than needed.

        Args:
            model: Any module. It is run in evaluation mode and left as it was.
            *example: Arguments of its forward pass: a small batch will do.

        Returns:
            The table for all parameters and buffers, groups named after the first tensor that has them.

        Raises:
            ValueError: If the permuted model is not the same function after all (as happens where tensors leave
                PyTorch during the forward pass).

        Complexity:
            Two forward passes.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
            >>> for name, axes in PermutationSpec.from_model(model, torch.zeros(1, 1, 4, 4)).axes.items():
            ...     print(name, axes)
            0.weight ('0', None, None, None)
            0.bias ('0',)
            3.weight (None, ('0', 4))
            3.bias (None,)
        """
        from weightlab.merge.permutation import Permutation, check_equivalence
        from weightlab.merge.tracing import trace_groups

        axes, sizes = trace_groups(model, *example)
        spec = cls(axes, sizes=sizes)
        # A random cycle moves every unit, and a generator of its own leaves PyTorch's as it was.
        order = Permutation.random(sizes, generator=torch.Generator().manual_seed(0))
        cycle = {group: index.roll(1)[index.argsort()] for group, index in order.indices.items()}
        check_equivalence(model, Permutation(cycle), example, spec=spec)
        return spec

    def group_sizes(self, params: Mapping[str, Tensor]) -> dict[str, int]:
        """Sizes of all groups, in the order of `groups`, by the tensors' shapes.

        Raises:
            ValueError: As `factors`.
        """
        sizes, origins = dict(self.sizes), dict.fromkeys(self.sizes, "sizes")
        for name, entry in self.axes.items():
            if name not in params:
                raise ValueError(f"the specification names {name!r}, which the parameters do not have")
            if len(entry) != params[name].ndim:
                raise ValueError(
                    f"{name} has {params[name].ndim} axes, shape {tuple(params[name].shape)}, but the specification "
                    f"gives it {len(entry)}: {entry}"
                )
        pairs = [
            (name, length, _parts(name, axis))
            for name, entry in self.axes.items()
            for length, axis in zip(params[name].shape, entry, strict=True)
            if axis is not None
        ]
        # Axes with one group tell its size, which may leave one unknown in others.
        progress = True
        while progress:
            progress = False
            for name, length, parts in pairs:
                unknown = [part for part in parts if isinstance(part, str) and part not in sizes]
                if len(unknown) == 1:
                    known = math.prod(sizes.get(p, 1) if isinstance(p, str) else p for p in parts)
                    sizes[unknown[0]], origins[unknown[0]] = length // known, name
                    progress = True
        for name, length, parts in pairs:
            for part in parts:
                if isinstance(part, str) and part not in sizes:
                    raise ValueError(
                        f"the size of group {part!r} cannot be told from {name}: give it in sizes="
                    )
            product = math.prod(sizes[part] if isinstance(part, str) else part for part in parts)
            if product != length:
                told = ", ".join(f"{p!r} {sizes[p]} by {origins[p]}" for p in parts if isinstance(p, str))
                raise ValueError(
                    f"{name} has an axis of length {length}, but {parts} makes {product} ({told})"
                )
        return {group: sizes[group] for group in self.groups}

    def factors(self, params: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Shapes in which every group is an axis of its own.

        Returns:
            For each tensor of the table a tuple of ``(group or None, size)``, to which it can be reshaped.

        Raises:
            ValueError: If a tensor is missing or has another number of axes; if sizes of a group differ or cannot be
                told; if two names are one tensor (tied weights) and differ in their axes.
        """
        sizes = self.group_sizes(params)
        owners: dict[tuple[int, tuple[int, ...]], str] = {}
        found: dict[str, Factors] = {}
        for name, entry in self.axes.items():
            tensor = params[name]
            if tensor.numel() and tensor.device.type != "meta":
                first = owners.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
                if self.axes[first] != entry:
                    raise ValueError(
                        f"{first} and {name} are one tensor (tied weights), but have axes {self.axes[first]} "
                        f"and {entry}: they must be the same"
                    )
            found[name] = tuple(
                (part, sizes[part]) if isinstance(part, str) else (None, part)
                for length, axis in zip(tensor.shape, entry, strict=True)
                for part in ((length,) if axis is None else _parts(name, axis))
            )
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PermutationSpec) and self.axes == other.axes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PermutationSpec({len(self.groups)} groups on {len(self.axes)} tensors)"


def _parts(name: str, axis: Axis) -> tuple[str | int, ...]:
    parts = () if axis is None else (axis,) if isinstance(axis, str) else axis
    if not isinstance(parts, tuple) or not all(
        isinstance(part, str) or (type(part) is int and part > 0) for part in parts
    ):
        raise TypeError(
            f"{name} has the axis {axis!r}; it must be None, a group's name, or a tuple of names and positive integers"
        )
    return parts
