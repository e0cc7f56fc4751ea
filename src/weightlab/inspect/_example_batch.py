"""A batch of examples that can be taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


class ExampleBatch:
    """Inputs and targets of a model, of any nesting of tuples, lists and dicts.

    Args:
        inputs: One argument, a tuple of arguments or a dict of keyword arguments.
        targets: What belongs to them.

    Attributes:
        tensors: The tensors with examples, inputs first.
        size: Number of examples.

    Raises:
        TypeError: If there is no tensor in `inputs`.
        ValueError: If there is no example, or tensors are of different lengths.
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        # Autograd refuses tensors from inference mode.
        self.inputs, self.targets = (
            change_tensors(tree, lambda x: x.clone() if x.is_inference() else x) for tree in (inputs, targets)
        )
        given = list(tensors(self.inputs))
        if not given:
            raise TypeError(
                f"inputs must be a tensor, or a tuple or dict that holds tensors; got {type(inputs).__name__}"
            )
        self.tensors = [*given, *tensors(self.targets)]
        self.size = len(given[0])
        if self.size == 0:
            raise ValueError("inputs hold no example")
        for x in self.tensors:
            if len(x) != self.size:
                raise ValueError(
                    "tensors of inputs and targets must hold one entry an example, in the first dimension; got shapes "
                    f"{tuple(given[0].shape)} and {tuple(x.shape)}"
                )

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for the model."""
        if isinstance(self.inputs, Mapping):
            return (), dict(self.inputs)
        return (tuple(self.inputs) if isinstance(self.inputs, tuple | list) else (self.inputs,)), {}

    def like(self, replacements: Sequence[Tensor]) -> ExampleBatch:
        """The same with other tensors."""
        rest = iter(replacements)
        inputs = change_tensors(self.inputs, lambda _: next(rest))
        return ExampleBatch(inputs, change_tensors(self.targets, lambda _: next(rest)))

    def __getitem__(self, examples: list[int]) -> ExampleBatch:
        return self.like([x[examples] for x in self.tensors])


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of one dimension or more in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        if tree.ndim:
            yield tree
    elif isinstance(tree, Mapping | tuple | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def change_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace what `tensors` finds, in its order."""
    if isinstance(tree, Tensor):
        return change(tree) if tree.ndim else tree
    if isinstance(tree, Mapping):
        return {key: change_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [change_tensors(value, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree
