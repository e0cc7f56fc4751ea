"""Permutations of hidden units: index vectors, and their action on a network's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from weightlab.merge.permutation_spec import PermutationSpec


@dataclass(frozen=True, eq=False)
class Permutation:
    """One index vector for each group: unit i of the permuted network is unit ``indices[group][i]`` of the old one.

    Args:
        indices: ``{group: int64 tensor of shape (size,)}``.

    Raises:
        ValueError: If a vector is not a permutation of 0 … size − 1.

    Example:
        >>> p = Permutation({"hidden": torch.tensor([2, 0, 1])})
        >>> p.inverse().indices["hidden"].tolist()
        [1, 2, 0]
        >>> p.compose(p.inverse()).is_identity()
        True
    """

    indices: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for group, index in self.indices.items():
            if index.ndim != 1 or not torch.equal(
                index.sort().values, torch.arange(len(index), device=index.device)
            ):
                raise ValueError(f"indices of group {group!r} are no permutation: {index.tolist()}")

    @staticmethod
    def identity(sizes: Mapping[str, int]) -> Permutation:
        """The permutation that moves nothing, for groups of these sizes."""
        return Permutation({group: torch.arange(size) for group, size in sizes.items()})

    @staticmethod
    def random(sizes: Mapping[str, int], *, generator: torch.Generator | None = None) -> Permutation:
        """Uniformly random permutations for groups of these sizes. `generator`: on the CPU; default PyTorch's."""
        return Permutation({g: torch.randperm(size, generator=generator) for g, size in sizes.items()})

    def inverse(self) -> Permutation:
        """The permutation that undoes this one."""
        return Permutation({group: index.argsort() for group, index in self.indices.items()})

    def compose(self, first: Permutation) -> Permutation:
        """The permutation that does what `first` does and then what this one does.

        Raises:
            ValueError: If their groups or sizes differ.
        """
        mine, others = ({g: len(i) for g, i in p.indices.items()} for p in (self, first))
        if mine != others:
            raise ValueError(f"permutations of different groups cannot be composed: {mine} and {others}")
        return Permutation({g: first.indices[g].to(index.device)[index] for g, index in self.indices.items()})

    def is_identity(self) -> bool:
        """Whether it moves nothing."""
        return all(
            bool((index == torch.arange(len(index), device=index.device)).all())
            for index in self.indices.values()
        )


def apply_permutation(
    spec: PermutationSpec, perm: Permutation, params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Permute a network's tensors.

    Args:
        spec: Which axes move together.
        perm: How. Groups that it leaves out stay as they are.
        params: Tensors by name, such as a state dict. Not changed.

    Returns:
        A dict with the same keys in the same order, dtypes and devices. Tensors without any group are those of `params`
        themselves, others are new.

    Raises:
        ValueError: If `spec` does not fit `params`, or a group's size differs, or `spec` does not have it.

    Complexity:
        One copy of a tensor for each of its groups.

    Example:
        >>> spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> perm = Permutation.random({"h": 8})
        >>> moved = apply_permutation(spec, perm, model.state_dict())
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(functional_call(model, moved, (x,)), model(x), atol=1e-6))
        True
    """
    check_groups(spec.group_sizes(params), perm)
    factors = spec.factors(params)
    out = dict(params)
    for name, parts in factors.items():
        tensor = params[name]
        view = tensor.reshape([size for _, size in parts])
        for axis, (group, _) in enumerate(parts):
            if group is not None and group in perm.indices:
                view = view.index_select(axis, perm.indices[group].to(tensor.device))
        if any(group in perm.indices for group, _ in parts):
            out[name] = view.reshape(tensor.shape)
    return out


def check_groups(sizes: Mapping[str, int], perm: Permutation) -> None:
    """Raise ValueError if a permutation has a group that is not among `sizes`, or of another size."""
    for group, index in perm.indices.items():
        if group not in sizes:
            raise ValueError(f"the specification has no group {group!r}; it has {sorted(sizes)}")
        if len(index) != sizes[group]:
            raise ValueError(f"group {group!r} has {sizes[group]} units, its permutation {len(index)}")


@torch.no_grad()
def check_equivalence(
    model: nn.Module, perm: Permutation, batch: Any, *, spec: PermutationSpec, rtol: float | None = None
) -> float:
    """Make sure that a permuted model is the same function, on a batch.

    A specification that ties too little passes every other check and gives a network that is merely broken.

    Args:
        model: The model; run in evaluation mode and left as it was.
        perm: The permutation. One that moves most units says most: see `Permutation.random`.
        batch: Its input: a tensor, or a tuple of the forward pass's arguments.
        spec: Which axes move together.
        rtol: Largest deviation of the outputs, relative to the largest output. Default None: 1e-3 for float32, and
            in proportion to the square root of the resolution for other dtypes.

    Returns:
        The largest deviation found, relative to the largest output.

    Raises:
        ValueError: If it is above `rtol`, or an output is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wrong = PermutationSpec({"0.weight": ("h", None), "2.weight": (None, "h")})  # the bias is missing
        >>> check_equivalence(model, Permutation.random({"h": 8}), torch.zeros(1, 3), spec=wrong)
        Traceback (most recent call last):
        ...
        ValueError: the permuted model is another function: ...
    """
    inputs = batch if isinstance(batch, tuple) else (batch,)
    moved = apply_permutation(spec, perm, model.state_dict())
    with evaluating(model):
        before = _floating(model(*inputs))
        after = _floating(call_with(model, moved, inputs))
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        if not (old.isfinite().all() and new.isfinite().all()):
            raise ValueError("the model's output is not finite on this batch; give another batch")
        allowed = 3 * torch.finfo(old.dtype).eps ** 0.5 if rtol is None else rtol
        scale = old.abs().max().clamp_min(torch.finfo(old.dtype).tiny)
        deviation = float((new - old).abs().max() / scale) if old.numel() else 0.0
        worst = max(worst, deviation)
        if deviation > allowed:
            raise ValueError(
                f"the permuted model is another function: outputs differ by {deviation:.2g} of the largest, allowed "
                f"{allowed:.2g}; the specification ties too little, or axes that do not belong together"
            )
    return worst


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model's modules into evaluation mode, and each back into its own afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def call_with(model: nn.Module, params: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    """Call a model with other tensors; names that are tied to another may have tensors of their own."""
    names = dict([*model.named_parameters(), *model.named_buffers()])
    return functional_call(model, {name: params[name] for name in names if name in params}, inputs)


def _floating(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
