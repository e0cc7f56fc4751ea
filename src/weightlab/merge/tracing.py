"""Find which axes of a model's tensors must be permuted together, by watching one forward pass.

Every axis of every tensor is a product of units: one unit as it starts, several once a reshape splits it. An operation makes
units of its arguments one (a matrix product those it contracts), hands them on to its result, or, where it
would not commute with a permutation, freezes them. What remains unfrozen at the end are the groups.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from weightlab.merge.permutation import evaluating
from weightlab.merge.permutation_spec import Axis


class Unit:
    """A factor of an axis: a set of interchangeable entries, one with others, or split into further units."""

    def __init__(self, size: int, *, frozen: bool = False) -> None:
        self.size = size
        self.frozen = frozen
        self.forward: list[Unit] | None = None

    def leaves(self) -> list[Unit]:
        """The units that this one has become."""
        return [self] if self.forward is None else leaves(self.forward)


Units = list[Unit]
Labels = list[Units]  # the units of each axis; an axis of length 1 has none


def leaves(units: Sequence[Unit]) -> Units:
    """The units that these have become."""
    return [leaf for unit in units for leaf in unit.leaves()]


def freeze(units: Sequence[Unit]) -> None:
    """Forbid to permute these units."""
    for leaf in leaves(units):
        leaf.frozen = True


def fixed(length: int) -> Units:
    """Units of an axis that stays as it is."""
    return [Unit(length, frozen=True)] if length > 1 else []


def split(units: Sequence[Unit], lengths: Sequence[int]) -> list[Units]:
    """Cut the units of an axis so that each of `lengths`, outermost first, has units of its own."""
    rest = leaves(units)
    parts: list[Units] = []
    for length in lengths:
        part: Units = []
        while length > 1:
            if not rest:
                raise ValueError("lengths do not make up the axis")
            unit = rest.pop(0)
            if length % unit.size and unit.size % length == 0:
                unit.forward = [
                    Unit(length, frozen=unit.frozen),
                    Unit(unit.size // length, frozen=unit.frozen),
                ]
                # The same unit may come again: take everything by what it has become.
                rest = leaves([unit, *rest])
                unit = rest.pop(0)
            elif length % unit.size:
                # No product of the other: entries of one are spread over several of the other.
                freeze([unit, *rest])
                total = unit.size * math.prod(u.size for u in rest)
                if total % length:
                    raise ValueError("lengths do not make up the axis")
                unit, rest = Unit(length, frozen=True), fixed(total // length)
            part.append(unit)
            length //= unit.size
        parts.append(part)
    return parts


def unite(a: Sequence[Unit], b: Sequence[Unit]) -> None:
    """Have two axes permuted alike."""
    left, right = leaves(a), leaves(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x is y:
            continue
        if x.size == y.size:
            x.frozen = x.frozen or y.frozen
            y.forward = [x]
        elif x.size % y.size == 0:
            x.forward = [Unit(y.size, frozen=x.frozen), Unit(x.size // y.size, frozen=x.frozen)]
            left, right = [x, *left], [y, *right]
        elif y.size % x.size == 0:
            y.forward = [Unit(x.size, frozen=y.frozen), Unit(y.size // x.size, frozen=y.frozen)]
            left, right = [x, *left], [y, *right]
        else:
            freeze([x, y, *left, *right])
            return
        left, right = leaves(left), leaves(right)


class Tracer(TorchFunctionMode):
    """Watches a forward pass and keeps the labels of every tensor."""

    def __init__(self) -> None:
        super().__init__()
        # Tensors are kept alive: the identity of one that is gone could come again.
        self.known: dict[int, tuple[Tensor, Labels]] = {}
        self.used: set[int] = set()

    def labels(self, tensor: Tensor) -> Labels:
        """Units of a tensor's axes; all fixed for one that was not seen before."""
        if id(tensor) not in self.known:
            self.known[id(tensor)] = (tensor, [fixed(length) for length in tensor.shape])
        self.used.add(id(tensor))
        return self.known[id(tensor)][1]

    def set(self, tensor: Tensor, labels: Sequence[Sequence[Unit]]) -> None:
        """Label a tensor."""
        self.known[id(tensor)] = (tensor, [list(units) for units in labels])

    def freeze_all(self, *values: Any) -> None:
        """Freeze all axes of all tensors in these values."""
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                for units in self.labels(leaf):
                    freeze(units)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and label its result."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(out)):
            return out
        name = _name(func)
        rule = RULES.get(name)
        try:
            if rule is None:
                raise ValueError(f"no rule for {name}")
            rule(self, out, func, args, kwargs)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError):
            # A call in a form that a rule does not foresee is treated as one without a rule.
            self.freeze_all(args, kwargs)
            for leaf in pytree.tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.set(leaf, [fixed(length) for length in leaf.shape])
        return out


Rule = Callable[[Tracer, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], None]
RULES: dict[str, Rule] = {}


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.strip("_")


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operations of these names, without leading and trailing underscores."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


@rule(
    "add radd iadd sub rsub isub mul rmul imul multiply div rdiv truediv rtruediv itruediv true_divide where maximum minimum "
    "lerp addcmul addcdiv eq ne lt le gt ge logical_and logical_or and or "
    "relu relu6 gelu silu mish sigmoid logsigmoid tanh elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus "
    "softsign threshold dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout exp log log1p expm1 "
    "sqrt rsqrt square abs neg pow rpow reciprocal sin cos erf clamp clamp_min clamp_max clip sign round "
    "softmax log_softmax normalize masked_fill nan_to_num "
    "clone contiguous detach to type float double half bfloat16 type_as zeros_like ones_like full_like empty_like "
    "rand_like randn_like requires_grad alias"
)
def _elementwise(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    labels: Labels = [[] for _ in out.shape]
    for tensor in _tensors(args, kwargs):
        mine = t.labels(tensor)
        for axis in range(1, tensor.ndim + 1):
            if tensor.shape[-axis] > 1:
                unite(labels[-axis], mine[-axis])
                labels[-axis] = mine[-axis]
    t.set(out, labels)


@rule("linear")
def _linear(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, weight, bias = _bind(_LINEAR, args, kwargs)
    x_axes, rows = t.labels(x), t.labels(weight)
    unite(x_axes[-1], rows[1])
    if bias is not None:
        unite(rows[0], t.labels(bias)[0])
    t.set(out, [*x_axes[:-1], rows[0]])


@rule("conv1d conv2d conv3d")
def _conv(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, weight, bias, *_, groups = _bind(_CONV, args, kwargs)
    spatial = weight.ndim - 2
    x_axes, kernel = t.labels(x), t.labels(weight)
    outer = split(kernel[0], [groups, weight.shape[0] // groups])
    # The blocks of a grouped convolution may be exchanged, and so may channels within all blocks alike.
    unite(x_axes[-spatial - 1], [*outer[0], *kernel[1]])
    _close(t, out, x_axes, kernel[2:], bias, kernel[0], spatial)


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv_transpose(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, weight, bias, *_, groups, _ = _bind(_CONV_TRANSPOSE, args, kwargs)
    spatial = weight.ndim - 2
    x_axes, kernel = t.labels(x), t.labels(weight)
    outer = split(kernel[0], [groups, weight.shape[0] // groups])
    unite(x_axes[-spatial - 1], kernel[0])
    _close(t, out, x_axes, kernel[2:], bias, [*outer[0], *kernel[1]], spatial)


def _close(
    t: Tracer, out: Tensor, x_axes: Labels, taps: Labels, bias: Tensor | None, channels: Units, spatial: int
) -> None:
    for units in (*x_axes[-spatial:], *taps):
        freeze(units)
    if bias is not None:
        unite(channels, t.labels(bias)[0])
    t.set(out, [*x_axes[: -spatial - 1], channels, *map(fixed, out.shape[-spatial:])])


@rule("batch_norm instance_norm group_norm prelu")
def _channel_vectors(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x, *vectors = _tensors(args, kwargs)
    axes = t.labels(x)
    if _name(func) == "group_norm":
        groups = kwargs.get("num_groups", args[1] if len(args) > 1 else 1)
        split(axes[1], [groups, x.shape[1] // groups])
    for vector in vectors:
        if vector.numel() > 1:
            unite(axes[1], t.labels(vector)[0])
        else:
            t.labels(vector)
    t.set(out, axes)


@rule("layer_norm rms_norm")
def _layer_norm(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _elementwise(t, out, func, args, kwargs)


@rule("embedding")
def _embedding(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    ids, weight = _tensors(args, kwargs)
    ids_axes, rows = t.labels(ids), t.labels(weight)
    freeze(rows[0])
    t.set(out, [*ids_axes, rows[1]])


@rule(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
    "upsample pad"
)
def _spatial(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    (x,) = _tensors(args, kwargs)
    digit = re.search(r"(\d)d$", _name(func))
    spatial = int(digit[1]) if digit else x.ndim - 2
    labels = t.labels(x)
    if _name(func) == "pad":
        spatial = len(kwargs.get("pad", args[1] if len(args) > 1 else ())) // 2
    for units in labels[x.ndim - spatial :]:
        freeze(units)
    t.set(out, [*labels[: x.ndim - spatial], *map(fixed, out.shape[x.ndim - spatial :])])


@rule("sum mean amax amin logsumexp var std norm")
def _reduce(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    (x,) = _tensors(args, kwargs)
    axes = t.labels(x)
    if out.ndim == 0:
        t.set(out, [])
        return
    given = kwargs.get("dim", kwargs.get("axis"))
    if given is None:
        given = (
            args[2]
            if _name(func) == "norm"
            else args[1]
            if isinstance(args[1], int | tuple | list)
            else args[1:]
        )
    dims = {dim % x.ndim for dim in ((given,) if isinstance(given, int) else given)}
    if out.ndim == x.ndim:
        t.set(out, [[] if i in dims else units for i, units in enumerate(axes)])
    else:
        t.set(out, [units for i, units in enumerate(axes) if i not in dims])
    _same_shape(t, out)


@rule("view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel")
def _reshape(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["input"]
    t.set(out, split([unit for units in t.labels(x) for unit in units], out.shape))


@rule(
    "transpose permute swapaxes swapdims movedim moveaxis t T mT H mH adjoint numpy_T chunk split tensor_split unbind "
    "getitem select narrow expand expand_as diagonal"
)
def _strided(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Strides of the same view of a contiguous tensor without data tell which axis went where.
    x = args[0]
    axes = t.labels(x)
    if (
        any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args[1:], kwargs)))
        and _name(func) != "expand_as"
    ):
        raise ValueError("indices are tensors")
    probe = torch.empty(x.shape, device="meta")
    views = func(probe, *args[1:], **kwargs)
    for result, view in zip(_sequence(out), _sequence(views), strict=True):
        labels: Labels = []
        moved: set[int] = set()
        for length, stride in zip(view.shape, view.stride(), strict=True):
            if length == 1:
                labels.append([])
            elif stride == 0:
                labels.append(fixed(length))
            else:
                axis = next(i for i, s in enumerate(probe.stride()) if s == stride and probe.shape[i] > 1)
                moved.add(axis)
                if length == x.shape[axis]:
                    labels.append(axes[axis])
                elif x.shape[axis] % length == 0 and int(view.storage_offset()) // stride % length == 0:
                    which, inner = split(axes[axis], [x.shape[axis] // length, length])
                    freeze(which)
                    labels.append(inner)
                else:
                    freeze(axes[axis])
                    labels.append(fixed(length))
        for axis, units in enumerate(axes):
            if axis not in moved:
                freeze(units)
        t.set(result, labels)


@rule("cat concat concatenate stack")
def _cat(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = _tensors(args, kwargs)
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % out.ndim
    if _name(func) != "stack":
        # Caches of keys and values start empty.
        tensors = [tensor for tensor in tensors if tensor.numel()] or tensors
        if len(tensors) == 1:
            t.set(out, t.labels(tensors[0]))
            _same_shape(t, out)
            return
    rows = [t.labels(tensor) for tensor in tensors]
    if _name(func) == "stack":
        rows = [[*row[:dim], [], *row[dim:]] for row in rows]
    for axis in range(out.ndim):
        for row in rows:
            if axis == dim:
                freeze(row[axis])
            else:
                unite(rows[0][axis], row[axis])
    t.set(out, [fixed(out.shape[axis]) if axis == dim else rows[0][axis] for axis in range(out.ndim)])


@rule("matmul rmatmul bmm mm mv")
def _matmul(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    a, b = _tensors(args, kwargs)
    t.set(out, _product(t, b, a) if _name(func) == "rmatmul" else _product(t, a, b))


@rule("addmm addmv baddbmm")
def _add_product(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec"), "baddbmm": ("batch1", "batch2")}[_name(func)]
    bias, a, b = _bind(dict.fromkeys(("input", *names)), args, kwargs)[:3]
    t.set(out, _broadcast([t.labels(bias), _product(t, a, b)]))


def _product(t: Tracer, a: Tensor, b: Tensor) -> Labels:
    left, right = t.labels(a), t.labels(b)
    unite(left[-1], right[-2] if b.ndim > 1 else right[-1])
    batch = _broadcast([left[:-2], right[:-2]])
    return [*batch, *(left[-2:-1] if a.ndim > 1 else []), *(right[-1:] if b.ndim > 1 else [])]


@rule("einsum")
def _einsum(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    equation = args[0].replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise ValueError("only equations with an output and without an ellipsis are understood")
    found: dict[str, Units] = {}
    for letters, tensor in zip(left.split(","), _tensors(args[1:], kwargs), strict=True):
        for letter, units in zip(letters, t.labels(tensor), strict=True):
            unite(found.setdefault(letter, units), units)
            found[letter] = found[letter] or units
    t.set(out, [found[letter] for letter in right])


@rule("scaled_dot_product_attention")
def _attention(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    q, k, v, *rest = (t.labels(x) for x in _tensors(args, kwargs))
    if kwargs.get("enable_gqa"):
        raise ValueError("queries share keys by their order")
    unite(q[-1], k[-1])
    unite(k[-2], v[-2])
    batch = _broadcast([q[:-2], k[:-2], v[:-2], *(mask[:-2] for mask in rest)])
    for units in (q[-2], k[-2], *(units for mask in rest for units in mask[-2:])):
        freeze(units)
    t.set(out, [*batch, q[-2], v[-1]])


@rule("multi_head_attention_forward")
def _multi_head(t: Tracer, out: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    if given["in_proj_weight"] is None or given.get("bias_k") is not None:
        raise ValueError("only the fused projection is understood")
    query, heads = given["query"], given["num_heads"]
    dims = query.shape[-1] // heads
    fused, projection = t.labels(given["in_proj_weight"]), t.labels(given["out_proj_weight"])
    which, *inner = split(fused[0], [3, heads, dims])
    freeze(which)
    units = [*inner[0], *inner[1]]
    unite(projection[1], units)
    for name in ("query", "key", "value"):
        labels = t.labels(given[name])
        unite(labels[-1], fused[1])
        for axis in labels[:-1]:
            freeze(axis)
    for name, axis in (("in_proj_bias", fused[0]), ("out_proj_bias", projection[0])):
        if given.get(name) is not None:
            unite(t.labels(given[name])[0], axis)
    t.freeze_all(given.get("attn_mask"), given.get("key_padding_mask"))
    result, weights = out
    t.set(result, [*t.labels(query)[:-1], projection[0]])
    if weights is not None:
        # Averaged over heads or not, heads stay what they are for whoever looks at them.
        t.set(weights, [fixed(length) for length in weights.shape])
        if weights.ndim == 4:
            freeze(inner[0])


def trace_groups(model: nn.Module, *example: Any) -> tuple[dict[str, tuple[Axis, ...]], dict[str, int]]:
    """Axes of a model's tensors and sizes of their groups, as `PermutationSpec` takes them.

    Args:
        model: The model; run in evaluation mode and left as it was.
        *example: Arguments of its forward pass.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    saved = model.state_dict().keys()
    tensors = {name: tensor for name, tensor in named if name in saved}
    tracer = Tracer()
    for tensor in tensors.values():
        if id(tensor) not in tracer.known:
            tracer.set(tensor, [[Unit(length)] if length > 1 else [] for length in tensor.shape])
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path of transformer layers is one opaque operation.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), evaluating(model), tracer:
            out = model(*example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    tracer.freeze_all(out)
    for tensor in tensors.values():
        if id(tensor) not in tracer.used:
            tracer.freeze_all(tensor)
    labels = {name: tracer.labels(tensor) for name, tensor in tensors.items()}
    for axes in labels.values():
        found = [leaf for units in axes for leaf in leaves(units)]
        freeze([leaf for leaf in found if found.count(leaf) > 1])
    return _table(labels)


def _table(labels: dict[str, Labels]) -> tuple[dict[str, tuple[Axis, ...]], dict[str, int]]:
    names: dict[Unit, str] = {}
    sizes: dict[str, int] = {}
    table: dict[str, tuple[Axis, ...]] = {}
    for name, axes in labels.items():
        entry: list[Axis] = []
        for units in axes:
            parts: list[str | int] = []
            for leaf in leaves(units):
                if leaf.frozen:
                    inner = parts.pop() if parts and isinstance(parts[-1], int) else 1
                    parts.append(inner * leaf.size)
                    continue
                if leaf not in names:
                    stem = re.sub(r"[._]?(weight|bias)$", "", name) or name
                    taken = sum(known.partition("#")[0] == stem for known in names.values())
                    names[leaf] = f"{stem}#{taken + 1}" if taken else stem
                    sizes[names[leaf]] = leaf.size
                parts.append(names[leaf])
            if all(isinstance(part, int) for part in parts):
                entry.append(None)
            else:
                entry.append(parts[0] if len(parts) == 1 and isinstance(parts[0], str) else tuple(parts))
        table[name] = tuple(entry)
    return table, sizes


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _sequence(value: Any) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else value


def _same_shape(t: Tracer, out: Tensor) -> None:
    if len(t.labels(out)) != out.ndim:
        raise ValueError("labels do not fit the result")


def _broadcast(batches: Sequence[Labels]) -> Labels:
    result: Labels = [[] for _ in range(max(map(len, batches)))]
    for batch in batches:
        for axis in range(1, len(batch) + 1):
            if batch[-axis]:
                unite(result[-axis], batch[-axis])
                result[-axis] = batch[-axis]
    return result


_LINEAR = {"input": None, "weight": None, "bias": None}
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONV_TRANSPOSE = {
    "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1,
}  # fmt: skip


def _bind(defaults: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return list((defaults | dict(zip(defaults, args, strict=False)) | kwargs).values())
