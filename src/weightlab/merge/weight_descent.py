"""Permute the hidden units of one network so that its weights come as close to another's as can be found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightlab.linalg.assignment import linear_assignment
from weightlab.merge.permutation import Permutation, apply_permutation, check_groups
from weightlab.merge.permutation_spec import Factors, PermutationSpec

# A smaller gain cannot be told from rounding, in units of the resolution: errors of n entries add like their root.
_ROUNDING = 8
# Columns exchanged one by one before a product is made anew, in units of its size.
_EXCHANGES = 8
# Where there are several starts, each pauses at a sweep that gains less than this share of what it gained so far.
_ENOUGH = 0.1


@dataclass(frozen=True, eq=False)
class WeightMatching(Permutation):
    """A permutation that `weight_matching` found, and how good it is.

    Attributes:
        objective: Inner product of A with the permuted B, over all tensors but integers and running statistics, tied ones once.
        distance: Euclidean distance of A and the permuted B, over the same.
        sweeps: Rounds through the groups that the best start took.
    """

    objective: float
    distance: float
    sweeps: int


@torch.no_grad()
def weight_matching(
    params_a: Mapping[str, Tensor],
    params_b: Mapping[str, Tensor],
    spec: PermutationSpec,
    *,
    n_restarts: int = 5,
    max_sweeps: int = 100,
    init: Permutation | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> WeightMatching:
    r"""Find the permutation π of B's units that minimises :math:`\|\theta_a - \pi(\theta_b)\|^2`.

    Coordinate descent: groups are visited in random order, and each takes the best permutation given the others', by
    a linear assignment, until none can gain. The result is a local optimum, even where B is a permutation of A (with
    one group it is the optimum), which is why it is sought several times, in other orders.

    Where to start matters more than the order. Units of layers far from inputs and outputs cannot be compared before
    their neighbours are matched, so by default a start grows from what is fixed: groups are matched one after the
    other by those tensors whose other axes are fixed or matched already, those of which most is known most likely
    first. From there the descent is shorter and ends higher than from the identity, the choice of Git Re-Basin, which
    is `init=Permutation.identity(spec.group_sizes(params_a))`. The result is never farther from A than B was.

    Shortcuts leave the result what it is, but for rounding: products with B are done again only for tensors of which
    another group has moved, and only for the columns that did; groups without such are not visited; and assignments
    begin at the prices of the group's last one.

    Args:
        params_a: Tensors of the reference by name, such as a state dict.
        params_b: Tensors of the network to permute: the same names and shapes.
        spec: Which axes move together. Running statistics of norms (`running_mean`, `running_var`) and integers follow
            their group and have no say.
        n_restarts: Starts and orders to try. Of several, each is left at the first sweep that gains less than a tenth
            of what it gained so far, and the best goes on to its end. Default 5. It ends early at distance 0.
        max_sweeps: Rounds through all groups in one of them, as in the official code of Git Re-Basin. Default 100.
        init: Where to start, all restarts. Default None: grown from what is fixed.
        generator: For the orders of starts and visits, on the CPU. Default None: PyTorch's.
        device: Where to multiply matrices. Default None: where each group's first tensor of A lies. Assignments are
            solved on the CPU.

    Returns:
        The permutation, to be applied to B, with index vectors on the CPU.

    Raises:
        ValueError: If names or shapes of A and B differ, `spec` does not fit them, an entry is not finite, or a
            number is below 1.

    Complexity:
        For a visit to a group of size n, a product of 2n² times the rest of the tensor flops for each tensor with a
        moved neighbour, and an assignment of O(n³) at worst. Memory: n² numbers for each such tensor, and for each
        of its groups a copy of A's and of B's.

    Reference:
        "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", arXiv 2402.04051; the algorithm
        is that of "Git Re-Basin", arXiv 2209.04836.

    Example:
        >>> from weightlab.merge import PermutationSpec, apply_permutation
        >>> spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h")})
        >>> a = {"0.weight": torch.randn(8, 3), "0.bias": torch.randn(8), "2.weight": torch.randn(2, 8)}
        >>> b = apply_permutation(spec, Permutation.random({"h": 8}), a)
        >>> found = weight_matching(a, b, spec)
        >>> found.distance, bool((apply_permutation(spec, found, b)["0.weight"] == a["0.weight"]).all())
        (0.0, True)
    """
    for name, number in (("n_restarts", n_restarts), ("max_sweeps", max_sweeps)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    check_same_tensors(params_a, params_b)
    sizes = spec.group_sizes(params_a)
    compared = compared_names(params_a, params_b)
    for name in compared:
        for which, params in (("params_a", params_a), ("params_b", params_b)):
            if not params[name].isfinite().all():
                raise ValueError(f"{name} of {which} has entries that are not finite")
    known = spec.factors(params_a)
    factors = {name: known[name] for name in compared if name in known}
    start = Permutation.identity(sizes)
    if init is not None:
        check_groups(sizes, init)
        start = Permutation({**start.indices, **{g: index.cpu() for g, index in init.indices.items()}})

    groups = [_Group(group, factors, params_a, params_b, device) for group in sorted(sizes)]
    starts = _Starts(groups, start.indices)

    def measured(descent: _Descent) -> WeightMatching:
        indices = dict(descent.indices)
        return WeightMatching(
            indices,
            *inner_product_and_distance(params_a, params_b, spec, Permutation(indices)),
            descent.sweeps,
        )

    best: tuple[_Descent, WeightMatching] | None = None
    for _ in range(n_restarts):
        descent = _Descent(groups, starts.draw(generator) if init is None else start.indices)
        descent.run(max_sweeps, generator, enough=_ENOUGH if n_restarts > 1 else 0.0)
        found = measured(descent)
        if best is None or found.objective > best[1].objective:
            best = descent, found
        if found.distance == 0 or len(groups) < 2:
            break
    assert best is not None
    descent, found = best
    if init is None and found.objective <= inner_product_and_distance(params_a, params_b, spec, start)[0]:
        descent = _Descent(groups, start.indices)
    if descent.settling:
        descent.run(max_sweeps, generator)
        found = measured(descent)
    return found


def check_same_tensors(params_a: Mapping[str, Tensor], params_b: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first, if two networks' tensors differ in names or shapes."""
    for name in [*params_a, *params_b]:
        if name not in params_b or name not in params_a:
            raise ValueError(f"{name} is only in {'params_a' if name in params_a else 'params_b'}")
        if params_a[name].shape != params_b[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(params_a[name].shape)} in params_a and {tuple(params_b[name].shape)} in "
                "params_b"
            )


def compared_names(params_a: Mapping[str, Tensor], params_b: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that have a say in a matching, sorted: no integers, no running statistics, tied ones once."""
    owners = {
        (params_a[name].data_ptr(), params_b[name].data_ptr(), params_a[name].shape): name
        for name in sorted(params_a, reverse=True)
        if params_a[name].is_floating_point()
        and name.rpartition(".")[2] not in ("running_mean", "running_var")
    }
    return sorted(owners.values())


def inner_product_and_distance(
    params_a: Mapping[str, Tensor], params_b: Mapping[str, Tensor], spec: PermutationSpec, perm: Permutation
) -> tuple[float, float]:
    """Inner product and Euclidean distance of A and the permuted B, over the tensors that have a say."""
    moved = apply_permutation(spec, perm, params_b)
    product = squares = 0.0
    for name in compared_names(params_a, params_b):
        a = params_a[name].double()
        b = moved[name].to(a.device, torch.float64)
        product += float((a * b).sum())
        squares += float((a - b).square().sum())
    return product, math.sqrt(squares)


class _Group:
    """Similarities of A's units with B's for one group, kept as long as they hold."""

    def __init__(
        self,
        name: str,
        factors: Mapping[str, Factors],
        params_a: Mapping[str, Tensor],
        params_b: Mapping[str, Tensor],
        device: torch.device | str | None,
    ) -> None:
        self.name = name
        self.coupled: list[_Coupled] = []
        self.alone: Tensor | None = None
        self.fixed = 0
        self.prices: Tensor | None = None
        self.noise = 0.0
        self.size = 0
        for tensor, parts in factors.items():
            axis = next((i for i, (group, _) in enumerate(parts) if group == name), None)
            if axis is None:
                continue
            self.size = parts[axis][1]
            a, b = params_a[tensor], params_b[tensor]
            device = a.device if device is None else device
            dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
            shape = [size for _, size in parts]
            # Units come last, so that the others are chosen by rows.
            a, b = (x.to(device, dtype).reshape(shape).movedim(axis, -1) for x in (a, b))
            self.noise += (
                _ROUNDING * torch.finfo(dtype).eps * float(a.norm() * b.norm()) / math.sqrt(self.size)
            )
            neighbours = [group for i, (group, _) in enumerate(parts) if i != axis]
            if any(neighbours):
                self.coupled.append(_Coupled(a.contiguous(), b.contiguous(), neighbours))
            else:
                # A bias, one number a unit, says too little to begin with.
                self.fixed += a.numel() if a.numel() > self.size else 0
                product = a.reshape(-1, self.size).T @ b.reshape(-1, self.size)
                self.alone = product if self.alone is None else self.alone + product

    def similarity(self, indices: Mapping[str, Tensor], coupled: Iterable[_Coupled]) -> Tensor:
        """Matrix of shape (size, size): what each unit of B in each place of A adds to the objective.

        Only through tensors that no other group permutes, and these that others do. It holds until the next call.
        """
        products = [part.product(indices) for part in coupled]
        if self.alone is not None:
            products.append(self.alone)
        if len(products) == 1:
            return products[0]
        total = products[0] + products[1]
        for product in products[2:]:
            total += product
        return total

    def assign(self, similarity: Tensor) -> Tensor:
        """The best permutation by these similarities."""
        columns, self.prices = linear_assignment(similarity, self.prices)
        return columns

    def stamp(self, moves: Mapping[str, int]) -> tuple[int, ...]:
        """Changes whenever a neighbour has moved."""
        return tuple(moves[g] for part in self.coupled for g in part.neighbours if g is not None)


class _Coupled:
    """A tensor of a group that other groups permute as well."""

    def __init__(self, a: Tensor, b: Tensor, neighbours: list[str | None]) -> None:
        self.a, self.b, self.neighbours = a, b, neighbours
        self.cached = a
        self.seen: dict[str, Tensor] = {}
        self.budget = 0

    def product(self, indices: Mapping[str, Tensor]) -> Tensor:
        """What each unit of B in each place of A adds to the objective through this tensor, until the next call."""
        now = {g: indices[g] for g in self.neighbours if g is not None}
        # All of them at first, when nothing has been seen.
        moved = [g for g in now if g not in self.seen or not torch.equal(now[g], self.seen[g])]
        places = (
            (now[moved[0]] != self.seen[moved[0]]).nonzero()[:, 0] if self.seen and len(moved) == 1 else None
        )
        if places is not None and len(places) <= self.budget:
            # Only what moved changes the product. The budget bounds rounding.
            self.budget -= len(places)
            axis = self.neighbours.index(moved[0])
            a = self.a.index_select(axis, places.to(self.a.device))
            fresh, stale = (
                self._permuted({**now, moved[0]: index[moved[0]][places]}) for index in (now, self.seen)
            )
            self.cached.addmm_(a.flatten(0, -2).T, (fresh - stale).flatten(0, -2))
        elif moved:
            self.budget = _EXCHANGES * max(now[g].numel() for g in moved)
            self.cached = self.a.flatten(0, -2).T @ self._permuted(now).flatten(0, -2)
        self.seen = now
        return self.cached

    def _permuted(self, indices: Mapping[str, Tensor]) -> Tensor:
        b = self.b
        for axis, group in enumerate(self.neighbours):
            if group is not None:
                b = b.index_select(axis, indices[group].to(b.device))
        return b


class _Starts:
    """Permutations grown from what is fixed: group by group, by the tensors whose other axes are matched before."""

    def __init__(self, groups: list[_Group], identity: Mapping[str, Tensor]) -> None:
        self.groups = [group for group in groups if group.coupled or group.alone is not None]
        self.identity = identity
        self.found: dict[tuple[str, ...], Tensor] = {}

    def draw(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Grow one, in random order."""
        indices, left, path = dict(self.identity), list(self.groups), ()
        while left:
            unknown = {group.name for group in left}
            ready = [
                [part for part in group.coupled if unknown.isdisjoint(part.neighbours)] for group in left
            ]
            known = [group.fixed + _entries(parts) for group, parts in zip(left, ready, strict=True)]
            if not any(known):
                chances, ready = [1.0] * len(left), [group.coupled for group in left]
            elif not path:
                chances = [float(count > 0) for count in known]
            else:
                total = [group.fixed + _entries(group.coupled) for group in left]
                chances = [count / whole for count, whole in zip(known, total, strict=True)]
            i = int(torch.multinomial(torch.tensor(chances), 1, generator=generator))
            group = left.pop(i)
            path = (*path, group.name)
            if path not in self.found:
                self.found[path] = group.assign(group.similarity(indices, ready[i]))
            indices[group.name] = self.found[path]
        return indices


def _entries(parts: Iterable[_Coupled]) -> int:
    return sum(part.a.numel() for part in parts)


class _Descent:
    """Coordinate descent from one start."""

    def __init__(self, groups: list[_Group], start: Mapping[str, Tensor]) -> None:
        self.groups = [group for group in groups if group.coupled or group.alone is not None]
        self.indices = dict(start)
        self.sweeps = 0
        self.settling = True
        self._gained = 0.0
        self._moves = dict.fromkeys(start, 0)
        self._settled: dict[str, tuple[int, ...]] = {}

    def run(self, max_sweeps: int, generator: torch.Generator | None, enough: float = 0.0) -> None:
        """Go on until nothing gains, or a sweep gains less than this share of all so far."""
        while self.settling and self.sweeps < max_sweeps:
            self.sweeps += 1
            gains = [
                self._visit(self.groups[i]) for i in torch.randperm(len(self.groups), generator=generator)
            ]
            self._gained += sum(gains)
            self.settling = any(gains)
            if sum(gains) < enough * self._gained:
                break

    def _visit(self, group: _Group) -> float:
        stamp = group.stamp(self._moves)
        if self._settled.get(group.name) == stamp:
            return 0.0
        self._settled[group.name] = stamp
        similarity = group.similarity(self.indices, group.coupled)
        new = group.assign(similarity)
        gain = _total(similarity, new) - _total(similarity, self.indices[group.name])
        if gain <= group.noise:
            return 0.0
        self.indices[group.name] = new
        self._moves[group.name] += 1
        return gain


def _total(similarity: Tensor, index: Tensor) -> float:
    return float(similarity.gather(1, index.to(similarity.device)[:, None]).double().sum())
