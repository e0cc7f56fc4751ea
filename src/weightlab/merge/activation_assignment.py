"""Permute the hidden units of one network so that they respond to data as another's do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.linalg.assignment import linear_assignment
from weightlab.merge.permutation import Permutation, evaluating
from weightlab.merge.permutation_spec import PermutationSpec
from weightlab.merge.weight_descent import check_same_tensors

# Which axis of a layer's weight and which of its output, counted from the end, hold its output units.
_LAYERS: tuple[tuple[type[nn.Module], int, int], ...] = (
    (nn.Linear, 0, -1),
    (nn.Embedding, 1, -1),
    (nn.Conv1d, 0, -2),
    (nn.Conv2d, 0, -3),
    (nn.Conv3d, 0, -4),
)


@torch.no_grad()
def activation_matching(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Any],
    spec: PermutationSpec,
    *,
    correlation: bool = False,
) -> Permutation:
    """Find the permutation of B's units with which their activations are most similar to A's, in one pass over data.

    Each group is matched by itself, by the sum over data of products of activations of A and B: a linear assignment,
    solved exactly, without the coupling of `weight_matching`. Activations are the outputs of the linear,
    convolution and embedding layers, before any nonlinearity; where several write into one group, as along
    a residual stream, their similarities are added.

    Args:
        model_a: The reference. Both are run in evaluation mode and left as they were.
        model_b: The network to permute: the same layers.
        loader: Batches, each the model's input or a sequence that starts with it.
        spec: Which axes move together.
        correlation: Compare by Pearson's correlation, so that units of large activations do not weigh more. Default
            False: by products, as in the paper.

    Returns:
        The permutation, to be applied to B, on the CPU. A group that no such layer puts out, as heads inside
        `nn.MultiheadAttention`, is left out and so stays as it is.

    Raises:
        ValueError: If names or shapes of the models differ, `spec` does not fit, an activation is not finite, or there
            is no batch.

    Complexity:
        Two forward passes, and for each batch 2n² flops a sample and group of n units; then O(n³) a group.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051; the method
        is that of "Git Re-Basin", arXiv 2209.04836.

    Example:
        >>> from weightlab.merge import PermutationSpec
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(20, 3)
        >>> activation_matching(model, model, [x], PermutationSpec.from_model(model, x)).is_identity()
        True
    """
    check_same_tensors(model_a.state_dict(), model_b.state_dict())
    sizes = spec.group_sizes(model_a.state_dict())
    places = _places(model_a, spec, sizes)
    sums: dict[tuple[str, str], _Moments] = {}
    batches = 0
    with evaluating(model_a), evaluating(model_b):
        for batch in loader:
            batches += 1
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            left, right = _outputs(model_a, places, inputs), _outputs(model_b, places, inputs)
            for key, x in left.items():
                sums.setdefault(key, _Moments()).add(x, right[key].to(x.device))
    if not batches:
        raise ValueError("loader has no batches (a generator that was used before is empty)")
    similarity: dict[str, Tensor] = {}
    for (layer, group), moments in sums.items():
        found = moments.correlation() if correlation else moments.products
        if not found.isfinite().all():
            raise ValueError(f"activations of {layer} are not finite on this data")
        similarity[group] = similarity[group] + found.to(similarity[group]) if group in similarity else found
    return Permutation({group: linear_assignment(similarity[group]).columns for group in sorted(similarity)})


class _Moments:
    """Running sums of two layers' activations, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.products = self.a = self.b = self.aa = self.bb = torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += x.shape[1]
        self.products = self.products.to(x.device) + (x @ y.T).double()
        x, y = x.double(), y.double()
        self.a, self.b = self.a.to(x.device) + x.sum(1), self.b.to(x.device) + y.sum(1)
        self.aa, self.bb = self.aa.to(x.device) + x.square().sum(1), self.bb.to(x.device) + y.square().sum(1)

    def correlation(self) -> Tensor:
        covariance = self.products - torch.outer(self.a, self.b) / self.count
        scales = [
            (square - total.square() / self.count).clamp_min(0).sqrt()
            for total, square in ((self.a, self.aa), (self.b, self.bb))
        ]
        product = torch.outer(*scales)
        # A unit that never changes is like no other.
        return torch.where(product > 1e-12 * product.max(), covariance / product, 0.0)


def _places(
    model: nn.Module, spec: PermutationSpec, sizes: dict[str, int]
) -> dict[str, tuple[int, list[tuple[str | None, int]]]]:
    """Layers that put out units of a group: the axis of their output, and its factors."""
    found = {}
    for name, module in model.named_modules():
        entry = spec.axes.get(f"{name}.weight" if name else "weight")
        for kind, weight_axis, output_axis in _LAYERS:
            if isinstance(module, kind) and entry is not None and entry[weight_axis] is not None:
                axis = entry[weight_axis]
                parts = axis if isinstance(axis, tuple) else (axis,)
                found[name] = (
                    output_axis,
                    [(part, sizes[part]) if isinstance(part, str) else (None, part or 1) for part in parts],
                )
    return found


def _outputs(
    model: nn.Module, places: dict[str, tuple[int, list[tuple[str | None, int]]]], inputs: Any
) -> dict[tuple[str, str], Tensor]:
    """Activations by layer and group, of shape (units, samples)."""
    caught: dict[tuple[str, str], list[Tensor]] = {}

    def catch(name: str, output: Tensor) -> None:
        axis, parts = places[name]
        dtype = torch.promote_types(output.dtype, torch.float32)
        moved = output.movedim(axis, 0)
        view = moved.reshape(*(size for _, size in parts), -1).to(dtype)
        for i, (group, size) in enumerate(parts):
            if group is not None:
                caught.setdefault((name, group), []).append(view.movedim(i, 0).reshape(size, -1))

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: catch(name, output))
        for name, module in model.named_modules()
        if name in places
    ]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {key: torch.cat(outputs, dim=1) for key, outputs in caught.items()}
