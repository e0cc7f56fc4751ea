"""Closed forms of per-example gradients, one for each kind of autograd node that meets a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightlab.inspect._ghost_norms import (
    Window,
    accumulation_dtype,
    conv_square,
    dense_square,
    lookup_square,
    outer_square,
)


class NoClosedForm(Exception):
    """A parameter's per-example gradients cannot be read from this graph; the message says what is in the way."""


@dataclass(frozen=True)
class Dense:
    """Per-example gradients themselves, `(B, ...)`."""

    gradient: Tensor

    def square(self, buffer: int) -> Tensor:
        """Squared norms, `(B,)`."""
        return dense_square(self.gradient)


@dataclass(frozen=True)
class Outer:
    """Gradients `Σ_t left_t right_tᵀ`: `(B, G, T, m)` and `(B, G, T, n)`."""

    left: Tensor
    right: Tensor

    def square(self, buffer: int) -> Tensor:
        """Squared norms, `(B,)`."""
        return outer_square(self.left, self.right, buffer)


@dataclass(frozen=True)
class Kernel:
    """Gradients of a convolution's kernel, as `conv_square` takes them."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    window: Window
    groups: int

    def square(self, buffer: int) -> Tensor:
        """Squared norms, `(B,)`."""
        return conv_square(self.pairs, self.window, self.groups, buffer)


@dataclass(frozen=True)
class Lookup:
    """Gradients whose row `i` is the sum of `rows`, `(B, S, d)`, with index `i`, `(B, S)`."""

    indices: Tensor
    rows: Tensor

    def square(self, buffer: int) -> Tensor:
        """Squared norms, `(B,)`."""
        return lookup_square(self.indices, self.rows)


Factors = Dense | Outer | Kernel | Lookup
# From the gradient of a node's output to the factors of its operand's gradients.
Rule = Callable[[Tensor], Factors]


class Batch:
    """Where the examples lie in a node's tensors, seen from the same node in a pass of few of them.

    Args:
        size: Number of examples B.
        example: Index of the one that came first in the pass of few.
        few: Number of examples in the pass of few.
    """

    def __init__(self, size: int, example: int, few: int = 1) -> None:
        self.size, self.example, self.few = size, example, few
        self._outermost: dict[object, bool] = {}

    def axis(self, shape: torch.Size, alone: torch.Size) -> int | None:
        """The dimension that holds the examples, given a tensor's shape for all and for few; None if there is none."""
        if len(shape) == len(alone):
            axes = [axis for axis, (n, m) in enumerate(zip(shape, alone, strict=True)) if n != m]
            if not axes:
                return None
            if len(axes) == 1 and shape[axes[0]] * self.few == self.size * alone[axes[0]]:
                return axes[0]
        raise NoClosedForm("is used on tensors that do not grow with the batch")

    def is_shared(self, shape: torch.Size, alone: torch.Size) -> bool:
        """Whether a tensor is the same for all examples."""
        return self.size > self.few and self.axis(shape, alone) is None

    def one(self, shape: torch.Size, alone: torch.Size) -> torch.Size:
        """Shape of a tensor for one example."""
        axis = None if self.size == self.few else self.axis(shape, alone)
        if axis is None:
            return alone
        return torch.Size((*alone[:axis], alone[axis] // self.few, *alone[axis + 1 :]))

    def outermost(self, full: Tensor, alone: Tensor) -> bool:
        """Whether a dimension that holds examples and positions runs through all positions of an example first."""
        axis = None if self.size == self.few else self.axis(full.shape, alone.shape)
        if axis is None or alone.shape[axis] == self.few:
            return True
        key = (full.data_ptr(), full.shape)
        if key not in self._outermost:
            k = alone.shape[axis] // self.few

            def apart(examples: int, counts: tuple[int, int], counts_alone: tuple[int, int]) -> Tensor:
                one = full.unflatten(axis, counts).select(axis + examples, self.example)
                same = alone.unflatten(axis, counts_alone).select(axis + examples, 0)
                return (one - same).abs().sum(dtype=torch.float32)

            inner = apart(1, (k, self.size), (k, self.few)) < apart(0, (self.size, k), (self.few, k))
            self._outermost[key] = not bool(inner)
        return self._outermost[key]

    def split(self, x: Tensor, alone: torch.Size, outermost: bool = True) -> Tensor:
        """Bring the examples to the front: shape `(B, ...)`, the rest as for one example."""
        if self.size == self.few:
            return x[None]
        axis = self.axis(x.shape, alone)
        if axis is None:
            return x.expand(self.size, *x.shape)
        k = alone[axis] // self.few
        if outermost:
            return x.unflatten(axis, (self.size, k)).movedim(axis, 0)
        return x.unflatten(axis, (k, self.size)).movedim(axis + 1, 0)


class Shared(Batch):
    """Tensors that are the same for all examples, and gradients that have been split already."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.size, batch.example, batch.few)

    def axis(self, shape: torch.Size, alone: torch.Size) -> int | None:
        """None: no dimension holds examples."""
        return None

    def split(self, x: Tensor, alone: torch.Size, outermost: bool = True) -> Tensor:
        """Repeat what is the same for all."""
        return x if x.ndim > len(alone) else x.expand(self.size, *x.shape)


@dataclass(frozen=True)
class Use:
    """A parameter, or a piece or view of one, as an operand of a node.

    Attributes:
        node: The node in the graph of the batch.
        alone: The same node in the graph of few examples.
        index: Which operand it is.
        shape: Shape of the operand.
        batch: Where examples lie.
    """

    node: Any
    alone: Any
    index: int
    shape: torch.Size
    batch: Batch

    @property
    def is_shared(self) -> bool:
        """Whether the node's output is the same for all examples."""
        return self.batch.is_shared(output_shape(self.node), output_shape(self.alone))

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the node's output for one example."""
        return self.batch.one(output_shape(self.node), output_shape(self.alone))

    def split(self, g: Tensor, outermost: bool = True) -> Tensor:
        """Split the gradient of the node's output by examples."""
        return self.batch.split(g, output_shape(self.alone), outermost)

    def sum_to_operand(self, gradient: Tensor) -> Dense:
        """Undo a broadcast of the operand in `(B, *output)`."""
        extra = gradient.ndim - 1 - len(self.shape)
        dims = [*range(1, 1 + extra)]
        dims += [
            1 + extra + axis
            for axis, n in enumerate(self.shape)
            if n == 1 and gradient.shape[1 + extra + axis] != 1
        ]
        if dims:
            gradient = gradient.sum(dims, keepdim=True, dtype=accumulation_dtype(gradient.dtype))
        return Dense(gradient.flatten(1))


def output_shape(node: Any) -> torch.Size:
    """Shape of a node's first output."""
    return node._input_metadata[0].shape


def read(use: Use) -> Rule:
    """Find the closed form for a use, and take from the graph what it needs.

    Raises:
        NoClosedForm: If there is none.
    """
    name = use.node.name()
    rule = RULES.get(name)
    if rule is None:
        raise NoClosedForm(f"is used by {name.rsplit('::', 1)[-1]}, for which there is no closed form")
    try:
        return rule(use)
    except AttributeError as error:  # a version of PyTorch that saves something else
        raise NoClosedForm(f"is used by {name}, which has not saved what the closed form needs") from error


def _broadcast(use: Use, factor: float = 1.0, outermost: bool = True) -> Rule:
    def rule(g: Tensor) -> Factors:
        g = use.split(g, outermost)
        return use.sum_to_operand(g if factor == 1 else g * factor)

    return rule


def _add(use: Use) -> Rule:
    return _broadcast(use, float(use.node._saved_alpha) if use.index else 1.0)


def _subtract(use: Use) -> Rule:
    return _broadcast(use, -float(use.node._saved_alpha) if use.index else 1.0)


def _multiply(use: Use) -> Rule:
    name = "_saved_self" if use.index else "_saved_other"
    other = getattr(use.node, name)
    outermost = True
    if other.shape == output_shape(use.node):
        outermost = use.batch.outermost(other, getattr(use.alone, name))

    def rule(g: Tensor) -> Factors:
        return use.sum_to_operand(use.split(g * other, outermost))

    return rule


def _matrix_product(use: Use, first: str, second: str, scale: float = 1.0) -> Rule:
    """Operand 0 or 1 of `first @ second`, matrices or stacks of them."""
    is_first = use.index == 0
    name = second if is_first else first
    other, alone = getattr(use.node, name), getattr(use.alone, name)
    outermost = use.batch.outermost(other, alone)
    stacked = other.ndim == 3
    if stacked and use.batch.axis(output_shape(use.node), output_shape(use.alone)) == 0:
        raise NoClosedForm("is multiplied as one matrix an example")

    def rule(g: Tensor) -> Factors:
        sides = [use.batch.split(other, alone.shape, outermost), use.split(g, outermost)]
        if is_first:
            sides = [side.mT for side in reversed(sides)]
        if not stacked:
            sides = [side.unsqueeze(1) for side in sides]
        return Outer(sides[0] if scale == 1 else sides[0] * scale, sides[1])

    return rule


def _mm(use: Use) -> Rule:
    return _matrix_product(use, "_saved_self", "_saved_mat2")


def _addmm(use: Use) -> Rule:
    if use.index == 0:
        mat1 = use.node._saved_mat1
        outermost = mat1 is None or use.batch.outermost(mat1, use.alone._saved_mat1)
        return _broadcast(use, float(use.node._saved_beta), outermost)
    shifted = Use(use.node, use.alone, use.index - 1, use.shape, use.batch)
    return _matrix_product(shifted, "_saved_mat1", "_saved_mat2", float(use.node._saved_alpha))


def _convolution(use: Use) -> Rule:
    node, batch = use.node, use.batch
    if use.index == 2:

        def bias(g: Tensor) -> Factors:
            return _sum_by_channel(use.split(g))

        return bias
    if use.index == 0:
        raise NoClosedForm("is the input of a convolution")
    x, alone = node._saved_input, use.alone._saved_input
    outermost = batch.outermost(x, alone)
    kernel = tuple(use.shape[2:])

    def geometry(name: str) -> tuple[int, ...]:
        numbers = tuple(getattr(node, f"_saved_{name}"))
        return numbers * len(kernel) if len(numbers) == 1 else numbers  # one stands for all dimensions

    stride, out = geometry("stride"), geometry("output_padding")
    window = Window(kernel, stride, geometry("padding"), geometry("dilation"))
    transposed, groups = node._saved_transposed, int(node._saved_groups)
    if transposed and any(n >= step for n, step in zip(out, stride, strict=True)):
        raise NoClosedForm("is the kernel of a convolution whose output_padding is no less than its stride")

    def rule(g: Tensor) -> Factors:
        inputs, gradients = batch.split(x, alone.shape, outermost), use.split(g, outermost)
        return Kernel(((gradients, inputs) if transposed else (inputs, gradients),), window, groups)

    return rule


def _embedding(use: Use) -> Rule:
    node, batch = use.node, use.batch
    if node._saved_scale_grad_by_freq:
        raise NoClosedForm("is an embedding with scale_grad_by_freq")
    indices, alone = node._saved_indices, use.alone._saved_indices
    outermost = batch.outermost(indices, alone)
    padding = node._saved_padding_idx

    def rule(g: Tensor) -> Factors:
        ids = batch.split(indices, alone.shape, outermost).flatten(1)
        rows = use.split(g, outermost).flatten(1, -2)
        return Lookup(ids, rows.masked_fill((ids == padding)[..., None], 0))

    return rule


def _layer_norm(use: Use) -> Rule:
    x, mean, scale = use.node._saved_input, use.node._saved_result1, use.node._saved_result2
    return _affine(use, lambda: (x - mean) * scale, channels=False)


def _rms_norm(use: Use) -> Rule:
    x, scale = use.node._saved_input, use.node._saved_result1
    return _affine(use, lambda: x * scale, channels=False)


def _group_norm(use: Use) -> Rule:
    x, mean, scale = use.node._saved_input, use.node._saved_result1, use.node._saved_result2

    def normalized() -> Tensor:
        groups = x.reshape(*mean.shape, -1)
        return ((groups - mean[..., None]) * scale[..., None]).reshape(x.shape)

    return _affine(use, normalized, channels=True)


def _batch_norm(use: Use) -> Rule:
    node = use.node
    if node._saved_training:
        raise NoClosedForm("belongs to a norm that uses the statistics of the batch")
    x, mean, variance = (getattr(node, f"_saved_{name}") for name in ("input", "running_mean", "running_var"))
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    shape = (-1, *[1] * (x.ndim - 2))
    return _affine(use, lambda: (x - mean.view(shape)) * (variance + eps).rsqrt().view(shape), channels=True)


def _affine(use: Use, normalized: Callable[[], Tensor], *, channels: bool) -> Rule:
    """Weight or bias of a norm, of channels (the second dimension) or of the last dimensions."""
    outermost = use.batch.outermost(use.node._saved_input, use.alone._saved_input)

    def rule(g: Tensor) -> Factors:
        if use.index == 1:
            g = g * normalized()
        g = use.split(g, outermost)
        return _sum_by_channel(g) if channels else use.sum_to_operand(g)

    return rule


def _sum_by_channel(g: Tensor) -> Dense:
    """Sum `(B, k, C, ...)` to `(B, C)`."""
    dims = [1, *range(3, g.ndim)]
    return Dense(g.sum(dims, dtype=accumulation_dtype(g.dtype)))


def _repeat(use: Use) -> Rule:
    """A vector repeated for each example, as instance norm does."""
    if len(use.shape) != 1 or len(use.output_shape) != 1:
        raise NoClosedForm("is repeated in several dimensions")

    def rule(g: Tensor) -> Factors:
        g = use.split(g)
        return Dense(g.unflatten(1, (-1, use.shape[0])).sum(1))

    return rule


# Nodes that spread an operand over examples.
BROADCASTS = {"AddBackward0", "ExpandBackward0", "MulBackward0", "SubBackward0"}
RULES: dict[str, Callable[[Use], Rule]] = {
    "AddBackward0": _add,
    "AddmmBackward0": _addmm,
    "BmmBackward0": _mm,
    "ConvolutionBackward0": _convolution,
    "CudnnBatchNormBackward0": _batch_norm,
    "EmbeddingBackward0": _embedding,
    "ExpandBackward0": _broadcast,
    "FusedRmsNormBackward0": _rms_norm,
    "MiopenBatchNormBackward0": _batch_norm,
    "MmBackward0": _mm,
    "MulBackward0": _multiply,
    "NativeBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeLayerNormBackward0": _layer_norm,
    "RepeatBackward0": _repeat,
    "SubBackward0": _subtract,
}
