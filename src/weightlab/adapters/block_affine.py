r"""Bone's arithmetic: a frozen weight, cut into r × r blocks, updated through a few small trainable ones.

Four variants, for a weight W of shape (out, in) with blocks W_ab, a < m = out/r, b < n = in/r:

=============== ============== ========================================== ===================
variant         trained D      updated weight                             r divides
=============== ============== ========================================== ===================
`"affine"`      (m, r, r)      W_ab + W_ab D_a + D_a                      out and in
`"affine_row"`  (n, r, r)      W_ab + W_ab D_b + D_b                      out and in
`"additive"`    (r, out)       W + Dᵀ [I I … I]                           nothing: r ≤ in
`"mini"`        (r, mini_r)    W + D̃ᵀ [I I … I], D̃ = [D D … D]            nothing: r ≤ in
=============== ============== ========================================== ===================

All start at D = 0, where the weight is as it was. `"affine"` is the method of the paper's first versions, called Bat
later; `"additive"` is what the last ones, and Hugging Face PEFT, call MiSS.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Variant = Literal["affine", "affine_row", "additive", "mini"]
ALIASES = {"bat": "affine", "miss": "additive"}


def resolve_variant(name: str) -> Variant:
    """Turn a variant's name or alias into its name.

    Raises:
        ValueError: If there is no such variant.

    Example:
        >>> resolve_variant("bat"), resolve_variant("mini")
        ('affine', 'mini')
    """
    variant = ALIASES.get(name, name)
    if variant not in get_args(Variant):
        choices = ", ".join((*get_args(Variant), *ALIASES))
        raise ValueError(f"variant={name!r} must be one of {choices}")
    return variant  # type: ignore[return-value]


def is_affine(variant: str) -> bool:
    """Whether the update depends on the weight."""
    return resolve_variant(variant) in ("affine", "affine_row")


def block_shape(
    out_features: int, in_features: int, r: int, variant: str = "affine", mini_r: int | None = None
) -> tuple[int, ...]:
    """Return the shape of D, and refuse sizes that the variant cannot have.

    Args:
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        r: Side of a block.
        variant: See the module.
        mini_r: Columns of D in the variant `"mini"`; default 1, the paper's.

    Raises:
        ValueError: If r or mini_r is below 1, or does not divide or fit what it has to.

    Example:
        >>> block_shape(12, 8, 4), block_shape(12, 8, 4, "affine_row"), block_shape(12, 8, 5, "additive")
        ((3, 4, 4), (2, 4, 4), (5, 12))
        >>> block_shape(12, 8, 3)
        Traceback (most recent call last):
        ValueError: r=3 must divide both sides of the weight, out 12 and in 8: choose a divisor of 4, or variant="additive"
    """
    variant = resolve_variant(variant)
    if not _is_count(r):
        raise ValueError(f"r={r!r} must be an integer of at least 1")
    if is_affine(variant):
        if out_features % r or in_features % r:
            raise ValueError(
                f"r={r} must divide both sides of the weight, out {out_features} and in {in_features}: choose a "
                f'divisor of {math.gcd(out_features, in_features)}, or variant="additive"'
            )
        return ((out_features if variant == "affine" else in_features) // r, r, r)
    if r > in_features:
        raise ValueError(
            f"r={r} is larger than the weight of out {out_features} and in {in_features} allows: at most {in_features}"
        )
    if variant == "additive":
        return (r, out_features)
    mini_r = 1 if mini_r is None else mini_r
    if not _is_count(mini_r) or out_features % mini_r:
        raise ValueError(
            f"mini_r={mini_r!r} must be an integer of at least 1 that divides out {out_features}"
        )
    return (r, mini_r)


def bone_weight(weight: Tensor, blocks: Tensor, variant: str = "affine") -> Tensor:
    """Compute the updated weight.

    Args:
        weight: W, (out, in), in any memory format.
        blocks: D; its shape says what r is. See the module.
        variant: `"affine"` (default), `"affine_row"`, `"additive"`, `"mini"`, or `"bat"`, `"miss"` for the first and third.

    Returns:
        (out, in), in the wider dtype of the two. Differentiable in both, any number of times.

    Raises:
        ValueError: If the shapes do not fit each other.

    Complexity:
        Affine: 2·out·in·r FLOP in one batched product, and one tensor (out, in), which is the result (two by rows).
        Additive: one pass over W.

    Paper:
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        arXiv 2409.15371.

    Example:
        >>> bone_weight(torch.eye(2), torch.full((1, 2, 2), 0.5))
        tensor([[2., 1.],
                [1., 2.]])
    """
    variant = _checked(weight, blocks, variant)
    dtype = torch.promote_types(weight.dtype, blocks.dtype)
    weight, blocks = weight.to(dtype), blocks.to(dtype)
    if is_affine(variant):
        stack = _stack(weight, blocks, variant)
        updated = torch.baddbmm(stack, stack, blocks)
        return _unstack(_add_blocks(updated, blocks, variant), weight, variant)
    return weight + bone_delta(weight, blocks, variant)


def bone_delta(weight: Tensor, blocks: Tensor, variant: str = "affine") -> Tensor:
    """Compute the update alone: `bone_weight` minus the weight, without cancellation.

    Args:
        weight: W, (out, in).
        blocks: D.
        variant: As for `bone_weight`.

    Returns:
        (out, in), in the wider dtype of the two.

    Example:
        >>> bone_delta(torch.zeros(1, 3), torch.tensor([[1.0], [2.0]]), "additive")
        tensor([[1., 2., 1.]])
    """
    variant = _checked(weight, blocks, variant)
    dtype = torch.promote_types(weight.dtype, blocks.dtype)
    blocks = blocks.to(dtype)
    if is_affine(variant):
        stack = _stack(weight.to(dtype), blocks, variant)
        return _unstack(_add_blocks(torch.bmm(stack, blocks), blocks, variant), weight, variant)
    out, inputs = weight.shape
    slices = -(-inputs // blocks.shape[0])
    return blocks.mT.repeat(out // blocks.shape[1], slices)[:, :inputs]


def bone_inverse(weight: Tensor, blocks: Tensor, variant: str = "affine") -> Tensor:
    """Find the weight that `bone_weight` turns into the one given.

    Args:
        weight: An updated weight, (out, in).
        blocks: D.
        variant: As for `bone_weight`.

    Returns:
        (out, in), in the wider dtype of the two; solved in float64.

    Raises:
        ValueError: If I + D_a is singular to float64, so that the update has lost the weight.

    Complexity:
        Affine: O(r³) a block of D and 2·out·in·r FLOP.

    Example:
        >>> blocks = torch.full((1, 2, 2), 0.5)
        >>> bone_inverse(bone_weight(torch.eye(2), blocks), blocks)
        tensor([[1., 0.],
                [0., 1.]])
    """
    variant = _checked(weight, blocks, variant)
    dtype = torch.promote_types(weight.dtype, blocks.dtype)
    if not is_affine(variant):
        return weight.to(dtype) - bone_delta(weight, blocks, variant)
    wide = blocks.double()
    factor = wide + torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    values = torch.linalg.svdvals(factor)
    singular = values[:, -1] <= values[:, 0] * torch.finfo(wide.dtype).eps * wide.shape[-1]
    if singular.any():
        first = int(singular.nonzero()[0])
        raise ValueError(
            f"the update cannot be undone: I + D is singular in {int(singular.sum())} of {len(blocks)} blocks, first "
            f"in block {first}; keep a copy of the weight instead"
        )
    stack = _add_blocks(_stack(weight.double(), wide, variant).clone(), -wide, variant)
    return _unstack(torch.linalg.solve(factor, stack, left=False), weight, variant).to(dtype)


def bone_linear(
    x: Tensor, weight: Tensor, blocks: Tensor, bias: Tensor | None = None, variant: str = "affine"
) -> Tensor:
    """Compute `F.linear(x, bone_weight(weight, blocks, variant), bias)` in less time and memory.

    Affine: the updated weight is made once for all tokens and again in backward rather than kept; backward needs one
    tensor (out, in) at a time. Additive and mini: no updated weight is made; the input's slices are summed and
    multiplied by D, and only that sum is kept. If the weight itself needs a gradient, the plain form is computed.

    Args:
        x: (..., in). Products are computed in its dtype, or in autocast's.
        weight: W, (out, in).
        blocks: D, in any floating dtype.
        bias: (out,).
        variant: As for `bone_weight`.

    Returns:
        (..., out), in the dtype of the products. Differentiable once in x, blocks and bias.

    Raises:
        ValueError: If the shapes do not fit each other.

    Complexity:
        For T tokens beyond the linear layer's own: affine forward 2·out·in·r FLOP; backward twice that, and the 2·T·out·in
        of a weight's gradient. Additive: T·in additions and 2·T·r·out FLOP, three times that with backward.

    Paper:
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        arXiv 2409.15371.

    Example:
        >>> x, weight, blocks = torch.ones(1, 2), torch.eye(2), torch.full((1, 2, 2), 0.5)
        >>> bone_linear(x, weight, blocks), F.linear(x, bone_weight(weight, blocks))
        (tensor([[3., 3.]]), tensor([[3., 3.]]))
    """
    variant = _checked(weight, blocks, variant)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if weight.requires_grad and torch.is_grad_enabled():
            return F.linear(x, bone_weight(weight, blocks.to(dtype), variant), bias)
        function = _AffineLinear if is_affine(variant) else _AdditiveLinear
        return function.apply(x, weight, blocks, bias, variant)  # type: ignore[return-value]


def slice_sum(x: Tensor, r: int) -> Tensor:
    """Sum the successive slices of length r of the last dimension; a shorter last one counts as filled up by zeros.

    Args:
        x: (..., in).
        r: Length of a slice, at most in.

    Returns:
        (..., r).

    Example:
        >>> slice_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 2)
        tensor([9., 6.])
    """
    whole = x.shape[-1] // r * r
    total = x[..., :whole].unflatten(-1, (whole // r, r)).sum(-2)
    if whole < x.shape[-1]:
        total[..., : x.shape[-1] - whole] += x[..., whole:]
    return total


class BlockAffine(nn.Module):
    """Bone as a parametrization of a weight, for `torch.nn.utils.parametrize.register_parametrization`.

    The original weight stays what it is, frozen if it was frozen, and `blocks` trains, from zeros. Assigning to the weight
    solves for the original. `remove_parametrizations` bakes the update in. The updated weight is kept for backward as
    any parametrized weight is; `BoneConfig` and `bone_linear` spare that.

    Args:
        r: Side of a block. Default 64, the paper's.
        variant: As for `bone_weight`. Default `"affine"`.
        mini_r: Columns of D in the variant `"mini"`. Default 1.

    Attributes:
        blocks: D, made when the parametrization is registered and the weight's shape is known.

    Raises:
        ValueError: If r or mini_r does not fit the weight; nothing is registered then.

    Paper:
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        arXiv 2409.15371.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(8, 4).requires_grad_(False)
        >>> _ = parametrize.register_parametrization(layer, "weight", BlockAffine(2))
        >>> [name for name, p in layer.named_parameters() if p.requires_grad]
        ['parametrizations.weight.0.blocks']
    """

    blocks: nn.Parameter

    def __init__(self, r: int = 64, variant: str = "affine", mini_r: int | None = None) -> None:
        super().__init__()
        self.r, self.variant, self.mini_r = r, resolve_variant(variant), mini_r
        self.register_parameter("blocks", None)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return bone_weight(weight, self.blocks, self.variant).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the original of an assigned weight; the first time, at registration, the weight itself."""
        if self.blocks is None:
            shape = block_shape(weight.shape[0], weight.shape[1], self.r, self.variant, self.mini_r)
            self.blocks = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            return weight
        return bone_inverse(weight, self.blocks, self.variant).to(weight.dtype)

    def extra_repr(self) -> str:
        """Show r and the variant."""
        return f"r={self.r}, variant={self.variant!r}"


class _AffineLinear(torch.autograd.Function):
    """A linear layer of the updated weight, which lives only while it is multiplied by."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, blocks: Tensor, bias: Tensor | None, variant: Variant
    ) -> Tensor:
        ctx.save_for_backward(x, weight, blocks)
        ctx.variant = variant
        return F.linear(x, bone_weight(weight, blocks.to(x.dtype), variant), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, blocks = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        of_x = of_blocks = None
        if ctx.needs_input_grad[0]:
            of_x = (g @ bone_weight(weight, blocks.to(x.dtype), ctx.variant)).view(x.shape)
        if ctx.needs_input_grad[2]:
            of_weight = g.mT @ x.reshape(-1, weight.shape[1])
            of_blocks = _affine_gradient(weight, of_weight, blocks, ctx.variant)
        return of_x, None, of_blocks, g.sum(0) if ctx.needs_input_grad[3] else None, None


class _AdditiveLinear(torch.autograd.Function):
    """A linear layer plus the product of D and the sum of the input's slices."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, blocks: Tensor, bias: Tensor | None, variant: Variant
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        total = slice_sum(x, blocks.shape[0]).view(-1, blocks.shape[0])
        ctx.save_for_backward(total, weight, blocks)
        ctx.shape = x.shape
        narrow = blocks.to(x.dtype)
        if blocks.shape[1] == weight.shape[0]:
            y.view(-1, y.shape[-1]).addmm_(total, narrow)
        else:
            y.view(len(total), y.shape[-1] // blocks.shape[1], blocks.shape[1]).add_(
                (total @ narrow)[:, None]
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, blocks = ctx.saved_tensors
        g = grads[0].reshape(-1, weight.shape[0])
        narrow = g
        if blocks.shape[1] != weight.shape[0]:
            narrow = g.unflatten(1, (weight.shape[0] // blocks.shape[1], blocks.shape[1])).sum(1)
        of_x = of_blocks = None
        if ctx.needs_input_grad[0]:
            of_x = g @ weight
            _add_to_slices(of_x, narrow @ blocks.to(g.dtype).mT)
            of_x = of_x.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            of_blocks = (total.mT @ narrow).to(blocks.dtype)
        return of_x, None, of_blocks, g.sum(0) if ctx.needs_input_grad[3] else None, None


def _add_to_slices(x: Tensor, slice: Tensor) -> None:
    """Add a slice (T, r) to every slice of x (T, in), in place: what `slice_sum` is the transpose of."""
    r = slice.shape[1]
    whole = x.shape[1] // r * r
    x[:, :whole].unflatten(1, (whole // r, r)).add_(slice[:, None])
    if whole < x.shape[1]:
        x[:, whole:].add_(slice[:, : x.shape[1] - whole])


def _affine_gradient(weight: Tensor, of_weight: Tensor, blocks: Tensor, variant: Variant) -> Tensor:
    """Sum W_abᵀ G_ab + G_ab over the blocks that share a D."""
    r = blocks.shape[-1]
    grids = of_weight.unflatten(1, (-1, r)).unflatten(0, (-1, r))
    dtype = blocks.dtype
    summed = grids.sum(2, dtype=dtype) if variant == "affine" else grids.sum(0, dtype=dtype).transpose(0, 1)
    product = torch.bmm(_stack(weight, blocks, variant).mT, _stack(of_weight, blocks, variant))
    return product.to(dtype) + summed


def _stack(weight: Tensor, blocks: Tensor, variant: Variant) -> Tensor:
    """Show a weight as (count, rows, r), in which rows of equal index share a block of D.

    By columns that is a view of a contiguous weight, whose rows are those of all blocks of a block-row.
    """
    r = blocks.shape[-1]
    if variant == "affine":
        return weight.reshape(len(blocks), -1, r)
    return weight.unflatten(1, (-1, r)).transpose(0, 1)


def _unstack(stack: Tensor, like: Tensor, variant: Variant) -> Tensor:
    """Put a stack together again, in the memory order of a weight, on which the last bits of products depend."""
    shape, by_columns = like.shape, like.mT.is_contiguous() and not like.is_contiguous()
    matrix = (stack if variant == "affine" else stack.transpose(0, 1)).reshape(shape)
    return matrix.mT.contiguous().mT if by_columns else matrix.contiguous()


def _add_blocks(stack: Tensor, blocks: Tensor, variant: Variant) -> Tensor:
    """Add D to every block of a stacked weight, in place."""
    r = blocks.shape[-1]
    if variant == "affine":
        stack.unflatten(1, (r, -1)).add_(blocks[:, :, None])
    else:
        stack.unflatten(1, (-1, r)).add_(blocks[:, None])
    return stack


def _checked(weight: Tensor, blocks: Tensor, variant: str) -> Variant:
    resolved = resolve_variant(variant)
    if weight.ndim != 2:
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be a matrix (out, in)")
    if blocks.ndim != (3 if is_affine(resolved) else 2):
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)} do not fit variant={variant!r}: {_SHAPES[resolved]}"
        )
    r = blocks.shape[1] if is_affine(resolved) else blocks.shape[0]
    wanted = block_shape(weight.shape[0], weight.shape[1], r, resolved, blocks.shape[1])
    if tuple(blocks.shape) != wanted:
        raise ValueError(
            f"blocks of shape {tuple(blocks.shape)} do not fit a weight of shape {tuple(weight.shape)} in "
            f"variant={variant!r}: {_SHAPES[resolved]}, here {wanted}"
        )
    return resolved


_SHAPES = {
    "affine": "(out/r, r, r)",
    "affine_row": "(in/r, r, r)",
    "additive": "(r, out)",
    "mini": "(r, mini_r)",
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
