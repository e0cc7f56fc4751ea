"""Merging more than two networks: all are permuted to match each other, then averaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from weightlab.merge.permutation import Permutation, apply_permutation
from weightlab.merge.permutation_spec import PermutationSpec
from weightlab.merge.weight_arithmetic import average, average_tensors, mixing_weights
from weightlab.merge.weight_descent import check_same_tensors, weight_matching

Scheme = Literal["mean", "star"]


@dataclass(frozen=True, eq=False)
class ManyMerge:
    """What `merge_many` found.

    Attributes:
        params: The merged network.
        permutations: What each model was permuted by; the identity for the reference.
        objective: Sum over all pairs of models of the inner products of their permuted tensors, over what `weight_matching` compares.
        distance: Root of the mean squared distance of the permuted models from their plain mean, over the same.
        rounds: Rounds through the models.
    """

    params: dict[str, Tensor]
    permutations: tuple[Permutation, ...]
    objective: float
    distance: float
    rounds: int


@torch.no_grad()
def merge_many(
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    spec: PermutationSpec,
    *,
    scheme: Scheme = "mean",
    reference: int = 0,
    weights: Sequence[float] | None = None,
    n_restarts: int = 5,
    max_rounds: int = 100,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> ManyMerge:
    r"""Permute the units of several networks so that all match, and average them.

    - ``"star"``: each model is matched to the reference, once. With good matches, models that were never matched to one
      another match as well; that is the paper's test.
    - ``"mean"``, Git Re-Basin's *MergeMany*: starting from the star, the models are visited in random order, and each is matched to
      the mean of the others, until none can gain. No step lowers :math:`\sum_{i<j} \langle \pi_i \theta_i, \pi_j \theta_j \rangle`,
      and with it the sum of the squared distances of all pairs never grows. In the end all are permuted alike so that the reference
      is back where it was.

    Args:
        models: Two or more: modules, or tensors by name such as state dicts, of the same names and shapes.
        spec: Which axes move together.
        scheme: As above. Default ``"mean"``.
        reference: Number of the model that keeps its units' order. Default 0, the first.
        weights: Of the models in the merged network, divided by their sum; they have no say in the matching. Default None: equal.
        n_restarts: Orders to try in each matching, as in `weight_matching`. Default 5.
        max_rounds: Rounds of ``"mean"``. Default 100.
        generator: For the orders, on the CPU. Default None: PyTorch's.
        device: Where to multiply matrices, as in `weight_matching`.

    Raises:
        ValueError: If there are fewer than two models, `reference` is none of them, `scheme` is unknown, weights do not fit, or as
            `weight_matching`.

    Complexity:
        For m models m − 1 matchings, and m for each round. Memory: besides the models, all of them permuted, and their sum in float32.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051, for the star;
        "Git Re-Basin", arXiv 2209.04836, for *MergeMany*.

    Example:
        >>> from weightlab.merge import apply_permutation
        >>> spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})
        >>> a = {"0.weight": torch.randn(8, 3), "0.bias": torch.randn(8), "2.weight": torch.randn(2, 8)}
        >>> copies = [apply_permutation(spec, Permutation.random({"h": 8}), a) for _ in range(3)]
        >>> merged = merge_many([a, *copies], spec)
        >>> all(bool((x == a[name]).all()) for name, x in merged.params.items())
        True
    """
    if len(models) < 2:
        raise ValueError(f"merging takes two models or more, got {len(models)}")
    if not 0 <= reference < len(models):
        raise ValueError(f"reference must be the number of a model, 0 to {len(models) - 1}, got {reference}")
    if scheme not in ("mean", "star"):
        raise ValueError(f"scheme must be 'mean' or 'star', got {scheme!r}")
    if max_rounds < 1:
        raise ValueError(f"max_rounds must be at least 1, got {max_rounds}")
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    for other in states[1:]:
        check_same_tensors(states[0], other)
    mixing_weights(len(states), weights)  # Bad weights are found before the work.
    sizes = spec.group_sizes(states[0])

    def match(target: Mapping[str, Tensor], i: int, init: Permutation | None) -> Permutation:
        found = weight_matching(
            target, states[i], spec, n_restarts=n_restarts, init=init, generator=generator, device=device
        )
        return Permutation(found.indices)

    permutations = [
        Permutation.identity(sizes) if i == reference else match(states[reference], i, None)
        for i in range(len(states))
    ]
    moved = [apply_permutation(spec, p, state) for p, state in zip(permutations, states, strict=True)]
    owners = _owners(states)
    rounds = 1
    if scheme == "mean" and len(states) > 2:
        progress, rounds = True, 0
        while progress and rounds < max_rounds:
            progress, rounds = False, rounds + 1
            for i in torch.randperm(len(states), generator=generator).tolist():
                others = _mean(moved[:i] + moved[i + 1 :], owners)
                found = match(others, i, permutations[i])
                if not _equal(found, permutations[i]):
                    permutations[i], progress = found, True
                    moved[i] = apply_permutation(spec, found, states[i])
        back = permutations[reference].inverse()
        permutations = [back.compose(p) for p in permutations]
        moved = [apply_permutation(spec, p, state) for p, state in zip(permutations, states, strict=True)]
    objective, distance = _compare(moved, owners)
    return ManyMerge(average(moved, weights), tuple(permutations), objective, distance, rounds)


def _owners(states: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """The name under which each tensor comes first; another than its own for tied ones."""
    seen: dict[tuple[object, ...], str] = {}
    return {
        name: seen.setdefault(tuple((s[name].data_ptr(), s[name].shape) for s in states), name)
        if states[0][name].numel()
        else name
        for name in states[0]
    }


def _mean(states: Sequence[Mapping[str, Tensor]], owners: Mapping[str, str]) -> dict[str, Tensor]:
    """Mean of networks in float32, in which tied tensors stay tied, so that they count once."""
    means: dict[str, Tensor] = {}
    for name, owner in owners.items():
        tensor = states[0][name]
        if not tensor.is_floating_point():
            means[name] = tensor
        elif owner in means:
            means[name] = means[owner]
        else:
            means[name] = average_tensors(
                [
                    state[name].to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))
                    for state in states
                ]
            )
    return means


def _compare(states: Sequence[Mapping[str, Tensor]], owners: Mapping[str, str]) -> tuple[float, float]:
    objective = squares = 0.0
    for name, owner in owners.items():
        if (
            name != owner
            or not states[0][name].is_floating_point()
            or name.endswith(("running_mean", "running_var"))
        ):
            continue
        tensors = [state[name].to(states[0][name].device, torch.float64) for state in states]
        mean = torch.stack(tensors).mean(0)
        own = sum(float(x.square().sum()) for x in tensors)
        objective += (len(states) ** 2 * float(mean.square().sum()) - own) / 2
        squares += sum(float((x - mean).square().sum()) for x in tensors)
    return objective, math.sqrt(squares / len(states))


def _equal(a: Permutation, b: Permutation) -> bool:
    return all(torch.equal(index, b.indices[group]) for group, index in a.indices.items())
