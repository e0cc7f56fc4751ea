"""Per-example gradient norms by one backward pass, read from the graph that autograd has recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from weightlab.inspect._ghost_norms import (
    accumulation_dtype,
    lookup_square,
    outer_lookup_product,
    outer_square,
)
from weightlab.inspect._ghost_rules import (
    BROADCASTS,
    Batch,
    Dense,
    Factors,
    Kernel,
    Lookup,
    NoClosedForm,
    Outer,
    Shared,
    Use,
    read,
)

# Nodes that hand on each entry of a parameter, or some of them, unchanged: gradients keep their norm through them.
_VIEWS = {
    f"{name}Backward0"
    for name in [
        "Alias",
        "Clone",
        "Permute",
        "ReshapeAlias",
        "Select",
        "Slice",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    ]
} | {"SqueezeBackward1", "SqueezeBackward2", "TransposeBackward1"}
# Views of a matrix that turn it over, and that leave it as it is.
_TURNS = {"TBackward0", "TransposeBackward0", "TransposeBackward1"}
_SAME = {"AliasBackward0", "ToCopyBackward0"}
# Views of a part, with one output for each part.
_SPLITS = {
    "ChunkBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "UnbindBackward0",
    "UnsafeSplitBackward0",
}
# Views after which the entries of a vector lie in the same order.
_ORDERED = {"AliasBackward0", "ToCopyBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"}
Path = tuple[tuple[Any, int], ...]

_UNLIKE = "is used differently by one example and by several"
_SHARED = "is used on what does not depend on the example"
_SEVERAL = "is used several times in different ways"


@dataclass(frozen=True)
class Run:
    """A forward pass: what came out, and the sum of the examples' losses."""

    outputs: Sequence[Tensor]
    loss: Tensor


def ghost_squares(
    parameters: Mapping[str, nn.Parameter],
    full: Run,
    size: int,
    probes: Iterable[tuple[Run, Batch]],
    buffer: int,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Squared norms of each example's gradients, where there is a closed form.

    Args:
        parameters: Which parameters, by name.
        full: The pass of all examples. Its graph is freed.
        size: Number of examples.
        probes: Passes of few of the examples, to find out which dimensions hold examples. The next is looked at for
            parameters that the one before leaves.
        buffer: Entries that temporary tensors may have.

    Returns:
        Shape `(B,)` for each parameter that has a closed form, and for each other what is in the way.
    """
    plans: dict[str, list[Plan]] = {}
    reasons: dict[str, str] = {}
    for alone, batch in probes:
        left = [name for name in parameters if not plans or reasons.get(name) == _UNLIKE]
        found, why = _plan({name: parameters[name] for name in left}, full, alone, batch)
        plans |= found
        reasons = {name: reason for name, reason in (reasons | why).items() if name not in plans}
        if _UNLIKE not in reasons.values():
            break
    nodes = {id(node): node for uses in plans.values() for plan in uses for node in plan.nodes}
    edges = [GradientEdge(node, 0) for node in nodes.values()]
    gradients = torch.autograd.grad(full.loss, edges, allow_unused=True) if edges else ()
    by_node = dict(zip(nodes, gradients, strict=True))
    zero = full.loss.new_zeros(size, dtype=accumulation_dtype(full.loss.dtype))
    squares: dict[str, Tensor] = {}
    for name, uses in plans.items():
        try:
            squares[name] = _square(uses, by_node, buffer, zero)
        except NoClosedForm as reason:
            reasons[name] = str(reason)
    return squares, reasons


@dataclass(frozen=True)
class Plan:
    """How to find the gradient of one use of a parameter.

    Attributes:
        nodes: The nodes of which the outputs' gradients are wanted.
        path: The views between the parameter and its use, each with the number of its output.
        rule: From these gradients to the factors of the parameter's.
    """

    nodes: Sequence[Any]
    path: Path
    rule: Callable[[Sequence[Tensor]], Factors]


@dataclass(frozen=True)
class _Operand:
    """What a node takes: it, its like in the other graph or None, the operand's number, source and views between."""

    node: Any
    other: Any
    index: int
    source: Any
    path: Path

    def use(self, batch: Batch) -> Use:
        if self.other is None:
            raise NoClosedForm(_UNLIKE)
        child, nr = self.node.next_functions[self.index]
        return Use(self.node, self.other, self.index, child._input_metadata[nr].shape, batch)


def _plan(
    parameters: Mapping[str, nn.Parameter], full: Run, alone: Run, batch: Batch
) -> tuple[dict[str, list[Plan]], dict[str, str]]:
    names = {get_gradient_edge(p).node: name for name, p in parameters.items()}
    plans: dict[str, list[Plan]] = {name: [] for name in parameters}
    reasons: dict[str, str] = {}
    users: dict[Any, list[_Operand]] = {}
    seen: set[Any] = set()
    for operand in _operands(full.outputs, alone.outputs, seen):
        users.setdefault(operand.source, []).append(operand)
    for leaf in _leaves(full.loss.grad_fn, seen):
        if leaf in names:
            reasons[names[leaf]] = "is used outside the model's forward pass"
    for leaf, name in names.items():
        try:
            plans[name] = [_plan_use(operand, users, batch) for operand in users.get(leaf, ())]
        except NoClosedForm as reason:
            reasons.setdefault(name, str(reason))
    return {name: uses for name, uses in plans.items() if name not in reasons}, reasons


def _plan_use(operand: _Operand, users: Mapping[Any, Sequence[_Operand]], batch: Batch) -> Plan:
    use = operand.use(batch)
    if not use.is_shared:
        rule = read(use)
        return Plan([use.node], operand.path, lambda gradients: rule(gradients[0]))
    # What the node gives is the same for all examples, as position embeddings are: look where it meets them.
    rule = read(Use(use.node, use.alone, use.index, use.shape, Shared(batch)))
    meetings = users.get(use.node, ())
    for user in meetings:
        views = {node.name() for node, _ in user.path}
        if user.node.name() not in BROADCASTS or not views <= _ORDERED:
            raise NoClosedForm(_SHARED)
    if not meetings:
        raise NoClosedForm(_SHARED)
    meets = [read(user.use(batch)) for user in meetings]
    shape = use.output_shape

    def combined(gradients: Sequence[Tensor]) -> Factors:
        dense = [cast(Dense, meet(g)).gradient for meet, g in zip(meets, gradients, strict=True)]
        return rule(torch.stack(dense).sum(0).reshape(-1, *shape))

    return Plan([user.node for user in meetings], operand.path, combined)


def _operands(outputs: Sequence[Tensor], others: Sequence[Tensor], seen: set[Any]) -> Iterator[_Operand]:
    """Walk two graphs side by side, from node to node without the views between."""
    alike = len(outputs) == len(others)
    stack = [
        (_follow(tensor.grad_fn, 0)[0], _follow(others[index].grad_fn, 0)[0] if alike else None)
        for index, tensor in enumerate(outputs)
    ]
    while stack:
        node, other = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        children = node.next_functions
        if other is not None and (other.name(), len(other.next_functions)) != (node.name(), len(children)):
            other = None
        for index, (child, nr) in enumerate(children):
            if child is not None:
                source, path = _follow(child, nr)
                yield _Operand(node, other, index, source, path)
                stack.append((source, None if other is None else _follow(*other.next_functions[index])[0]))


def _leaves(root: Any, seen: set[Any]) -> Iterator[Any]:
    """What the nodes take that lead to the loss and are not in `seen`."""
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            for child, nr in node.next_functions:
                leaf, _ = _follow(child, nr)
                yield leaf
                stack.append(leaf)


def _is_view(node: Any) -> bool:
    return node.name() in _VIEWS or node.name() in _SPLITS


def _follow(node: Any, nr: int) -> tuple[Any, Path]:
    """Go through views to what is viewed."""
    path: list[tuple[Any, int]] = []
    while node is not None and _is_view(node):
        path.append((node, nr))
        node, nr = node.next_functions[0]
    return node, tuple(path)


def _square(
    uses: Sequence[Plan], gradients: Mapping[int, Tensor | None], buffer: int, zero: Tensor
) -> Tensor:
    """Add up the uses of a parameter, of which some may be of pieces that do not overlap."""
    pieces: dict[object, list[tuple[Path, Factors]]] = {}
    for use in uses:
        found = [gradients[id(node)] for node in use.nodes]
        if any(g is None for g in found):
            if any(g is not None for g in found):
                raise NoClosedForm("reaches the loss on some ways only")
            continue
        split = use.path[-1] if use.path and use.path[-1][0].name() in _SPLITS else None
        key = None if split is None else (_cut(split[0]), split[1])
        factors = use.rule(cast(Sequence[Tensor], found))
        pieces.setdefault(key, []).append((use.path[:-1] if split else use.path, factors))
    if len(pieces) > 1 and len({key[0] if isinstance(key, tuple) else None for key in pieces}) > 1:
        raise NoClosedForm("is cut into pieces in several ways")
    total = zero
    for parts in pieces.values():
        square = parts[0][1].square(buffer) if len(parts) == 1 else _square_of_sum(parts, buffer)
        total = total + square.to(total.device)
    return total


def _cut(split: Any) -> object:
    return split.name(), split._saved_dim, tuple(tuple(piece.shape) for piece in split._input_metadata)


def _square_of_sum(uses: Sequence[tuple[Path, Factors]], buffer: int) -> Tensor:
    """Squared norms of a sum of gradients of the same entries."""
    nodes = [node for path, _ in uses for node, _ in path]
    views = {node.name() for node in nodes}
    factors = [factor for _, factor in uses]
    dense = [factor.gradient for factor in factors if isinstance(factor, Dense)]
    if len(dense) == len(factors) and views <= _ORDERED:
        return Dense(torch.stack(dense).sum(0)).square(buffer)
    kernels = [factor for factor in factors if isinstance(factor, Kernel)]
    alike = len({(kernel.window, kernel.groups) for kernel in kernels}) == 1
    if len(kernels) == len(factors) and alike and views <= _SAME:
        pairs = tuple(pair for kernel in kernels for pair in kernel.pairs)
        return Kernel(pairs, kernels[0].window, kernels[0].groups).square(buffer)
    matrices = all(len(node._input_metadata[0].shape) == 2 for node in nodes)
    outer = [_turned(path, factor) for path, factor in uses if isinstance(factor, Outer)]
    lookup = [factor for path, factor in uses if isinstance(factor, Lookup) and not path]
    if len(outer) + len(lookup) < len(factors) or not (matrices and views <= _TURNS | _SAME):
        raise NoClosedForm(_SEVERAL)
    total = torch.zeros((), device=(outer[0].left if outer else lookup[0].rows).device)
    left = right = total
    if outer:
        left, right = (torch.cat([getattr(side, name) for side in outer], 2) for name in ("left", "right"))
        total = outer_square(left, right, buffer)
    if lookup:
        indices = torch.cat([side.indices for side in lookup], 1)
        rows = torch.cat([side.rows for side in lookup], 1)
        total = total + lookup_square(indices, rows)
        if outer:
            total = total + 2 * outer_lookup_product(left.squeeze(1), right.squeeze(1), indices, rows, buffer)
    return total


def _turned(path: Path, factor: Outer) -> Outer:
    """The same gradient as it is before the views."""
    turns = sum(node.name() in _TURNS for node, _ in path)
    return Outer(factor.right, factor.left) if turns % 2 else factor
