"""Matrix optimizers on many devices: every rank turns its share of the matrices into directions."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from weightlab.optim import multi_tensor
from weightlab.optim.matrix_optimizer import (
    Directions,
    Group,
    LowRank,
    MatrixOptimizer,
    _apply,
    _label,
    _local,
    _momentum,
    _moved,
)

State = dict[str, Any]
Optimizing = TypeVar("Optimizing", bound=MatrixOptimizer)


def distribute(optimizer: Optimizing, process_group: dist.ProcessGroup | None = None) -> Optimizing:
    """Share the matrix rule's work between ranks that hold the same parameters and gradients.

    For `DistributedDataParallel`. Every rank keeps momentum and weights as before; the rule itself, such as
    Newton-Schulz, is run for each matrix by one rank, its owner, and the directions are exchanged. The
    weights that result are those of a single process: to the last bit where the owner's kernels are the
    same, to rounding where stacks of equal shapes are shorter than they would be in one process.

    - Matrices are dealt out by cost (`MatrixOptimizer.cost`), the dearest first, each to the rank with least
      to do. A parameter is never cut, not even one that holds several matrices (`stacked`, `split`).
    - Parameters whose rule costs no more than reading them (`cost` 0) stay with every rank.
    - What a rule keeps of a matrix besides its momentum lives on its owner only; see `consolidate`.
    - AdamW's share of the parameters is moved by every rank.

    Parameters that are `DTensor`s, as after `fully_shard`, are shared by their own device mesh without this
    call; see the page on distributed training for which placements there are.

    Args:
        optimizer: Changed in place.
        process_group: Ranks that hold equal parameters. Default: all of them.

    Returns:
        The optimizer.

    Raises:
        RuntimeError: If there is no process group.
        TypeError: If `optimizer` is no `MatrixOptimizer`.
        ValueError: If it is distributed already, or this rank is not in the group.

    Complexity:
        A step sends the directions once, by one all-gather for each parameter group and dtype: as many
        bytes as half of DDP's all-reduce of their gradients.

    Example:
        >>> import tempfile
        >>> from weightlab.optim import HybridAuON
        >>> file = tempfile.NamedTemporaryFile()
        >>> dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = distribute(HybridAuON(model.named_parameters(), lr=0.02))
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> dist.destroy_process_group()
    """
    if not isinstance(optimizer, MatrixOptimizer):
        raise TypeError(f"distribute takes a MatrixOptimizer, got {type(optimizer).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(
            "distribute needs a process group; call torch.distributed.init_process_group first "
            "and start the script with torchrun"
        )
    if optimizer.sharing is None:
        optimizer.sharing = Sharing(optimizer)
    optimizer.sharing.share_copies(cast(dist.ProcessGroup, process_group or dist.group.WORLD))
    return optimizer


def consolidate(optimizer: Optimizer) -> None:
    """Collect on every rank what a rule keeps of the matrices of other ranks.

    `optimizer.state_dict()` does so by itself, and has therefore to be called on every rank if the rule has
    state of its own. Where only one rank calls it, as in some training loops, call this on every rank
    first: what it collects serves `state_dict` until the next step.

    Args:
        optimizer: Any, also in a wrapper such as Accelerate's; one that is not distributed is left alone.
    """
    while not isinstance(optimizer, MatrixOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = cast(Any, optimizer).optimizer
    if isinstance(optimizer, MatrixOptimizer) and optimizer.sharing is not None:
        optimizer.sharing.collect()


class Layout(NamedTuple):
    """Who holds a parameter: `replicas` equal copies, each cut by rows over `shards`.

    Attributes:
        replicas: Ranks that hold the same rows as this one; `None` if it is the only one.
        shards: Ranks that hold the rows of one copy, in order; `None` if this one holds all.
    """

    replicas: dist.ProcessGroup | None
    shards: dist.ProcessGroup | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of replicas, and of shards in each."""
        return _size(self.replicas), _size(self.shards)

    @property
    def here(self) -> tuple[int, int]:
        """This rank's replica, and its shard in it."""
        return _rank(self.replicas), _rank(self.shards)

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same groups, however they were come by."""
        return _name(self.replicas), _name(self.shards)


def layout_of(parameter: Tensor, name: str, process_group: dist.ProcessGroup | None = None) -> Layout:
    """Find out who holds a parameter.

    Args:
        parameter: A `DTensor`, or a tensor that all ranks of `process_group` hold.
        name: What to call it in errors.
        process_group: For tensors that are no `DTensor`; `None` if nobody else holds them.

    Raises:
        NotImplementedError: For placements other than at most one `Shard(0)` and at most one `Replicate()`.
    """
    if not isinstance(parameter, DTensor):
        return Layout(process_group if _size(process_group) > 1 else None, None)
    mesh, placements = parameter.device_mesh, parameter.placements
    dims = [i for i in range(mesh.ndim) if mesh.size(i) > 1]
    replicas = [i for i in dims if type(placements[i]) is Replicate]
    shards = [i for i in dims if placements[i] == Shard(0)]
    if len(replicas) + len(shards) < len(dims) or len(replicas) > 1 or len(shards) > 1:
        raise NotImplementedError(
            "a matrix rule needs whole matrices and can gather those placed Shard(0) over one dimension of the "
            f"mesh (FSDP2), with or without Replicate() over another (HSDP), but {name} of shape "
            f"{tuple(parameter.shape)} is placed {placements} on a mesh of shape {tuple(mesh.shape)}; "
            "shard it by rows only, or put it in a group with use_matrix_rule=False, which AdamW moves"
        )
    return Layout(*(mesh.get_group(found[0]) if found else None for found in (replicas, shards)))


def rows_of_shards(rows: int, shards: int) -> list[int]:
    """How many rows each shard of a parameter placed `Shard(0)` holds.

    Example:
        >>> rows_of_shards(5, 4)
        [2, 2, 1, 0]
    """
    chunk = -(-rows // shards)
    return [min(chunk, max(0, rows - i * chunk)) for i in range(shards)]


def deal_out(costs: Sequence[float], loads: list[float]) -> list[int]:
    """Deal work out: the dearest first, each to the worker with the least to do, the first of equals.

    Args:
        costs: Of each piece of work.
        loads: What each worker has to do already; brought up to date.

    Returns:
        The worker for each piece. If nobody had anything to do, the largest load is at most 4/3 of the least possible.

    Example:
        >>> deal_out([1.0, 3.0, 2.0, 2.0], [0.0, 0.0])
        [0, 0, 1, 1]
    """
    workers = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        workers[i] = min(range(len(loads)), key=loads.__getitem__)
        loads[workers[i]] += costs[i]
    return workers


def all_agree(flags: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Whether a flag is set on all ranks that hold a part of a tensor.

    Args:
        flags: 0-dim and boolean, one for each tensor, on one device.
        parts: Tensors, the same on all ranks; flags of those that are no `DTensor`s stay as they are.
    """
    agreed = list(flags)
    by_mesh: dict[DeviceMesh, list[int]] = {}
    for i, part in enumerate(parts):
        if isinstance(part, DTensor):
            by_mesh.setdefault(part.device_mesh, []).append(i)
    for mesh, chosen in by_mesh.items():
        together = torch.stack([flags[i] for i in chosen]).int()
        for group in mesh.get_all_groups():
            dist.all_reduce(together, dist.ReduceOp.MIN, group)
        for i, flag in zip(chosen, together.bool().unbind(), strict=True):
            agreed[i] = flag
    return agreed


class _Terms(NamedTuple):
    """What all ranks must know of a rule's results before the first exchange, though only owners see them."""

    dtype: torch.dtype
    scaled: bool
    keeps_state: bool


class Sharing:
    """How ranks share the matrices of one optimizer; `distribute` makes it.

    A matrix has one owner among the replicas × shards ranks that hold it. Its rows go to the owner by
    all-to-all among the shards of the owner's replica, the owner runs the rule, rows of the direction go back
    the same way, and all-gather takes them to the other replicas. Data parallelism is the case of one
    shard, full sharding that of one replica.
    """

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        self._optimizer = optimizer
        self._process_group: dist.ProcessGroup | None = None
        self._layouts: dict[Tensor, Layout] = {}
        self._owners: dict[Tensor, tuple[int, int]] = {}
        self._loads: dict[tuple[str, str], list[float]] = {}
        self._terms: dict[object, _Terms] = {}
        self._collected: dict[int, State] | None = None
        optimizer.register_state_dict_post_hook(self._completed)

    def share_copies(self, process_group: dist.ProcessGroup) -> None:
        """Share those parameters as well that are no `DTensor`s but held whole by all ranks of a group."""
        if self._process_group is not None:
            raise ValueError("the optimizer is distributed already; call distribute once")
        if dist.get_rank(process_group) < 0:
            raise ValueError("process_group does not hold this rank; call distribute on its members only")
        self._process_group = process_group
        self._layouts = {p: layout for p, layout in self._layouts.items() if isinstance(p, DTensor)}

    def owner(self, parameter: Tensor) -> tuple[int, int] | None:
        """Replica and shard of the rank that runs the rule for a parameter; `None` if every rank does."""
        self._deal()
        return self._owners.get(parameter)

    def step(self, group: Group, params: Sequence[Tensor]) -> list[Tensor]:
        """Move those of a group's parameters that are shared and return the others."""
        self._collected = None
        self._deal()
        place = next(i for i, other in enumerate(self._optimizer.param_groups) if other is group)
        together: dict[tuple[object, ...], list[Tensor]] = {}
        for p in params:
            if p in self._owners:
                together.setdefault((place, self._layouts[p].key, p.dtype), []).append(p)
        for key, chosen in together.items():
            self._step_together(group, chosen, key)
        return [p for p in params if p not in self._owners]

    def collect(self) -> None:
        """Collect what owners keep, for `state_dict` to use until the next step."""
        self._collected = self._states_of_owners()

    def _deal(self) -> None:
        """Find owners for parameters that have none: the same on every rank, whatever has a gradient."""
        lots: dict[tuple[str, str], list[tuple[list[Tensor], float]]] = {}
        for group in self._optimizer.param_groups:
            new = [p for p in group["params"] if group["use_matrix_rule"] and p not in self._layouts]
            shared = []
            for p in new:
                layout = self._layouts[p] = layout_of(p, _label(group, p), self._process_group)
                cost = self._optimizer.cost(p.shape, group)
                # On a mesh of one rank as well: a step in one process knows nothing of DTensors.
                if isinstance(p, DTensor) or (layout.replicas is not None and cost > 0):
                    shared.append(([p], cost))
            if shared and self._optimizer.keeps_group_together(group):
                if len({(self._layouts[p].key, p.dtype) for p in new}) > 1:
                    raise ValueError(
                        f"{type(self._optimizer).__name__} wants all parameters of a group on one rank, but "
                        f"{_label(group, new[0])} and others of its group differ in dtype or in how they "
                        "are distributed; make groups of parameters that agree in both"
                    )
                shared = [(new, sum(cost for _, cost in shared))]
            for lot in shared:
                lots.setdefault(self._layouts[lot[0][0]].key, []).append(lot)
        for key, entries in lots.items():
            replicas, shards = self._layouts[entries[0][0][0]].sizes
            loads = self._loads.setdefault(key, [0.0] * (replicas * shards))
            # Where a rule is as good as free, what is left to balance is memory.
            costs = [cost or float(sum(p.numel() for p in params)) for params, cost in entries]
            for (params, _), worker in zip(entries, deal_out(costs, loads), strict=True):
                self._owners.update((p, divmod(worker, shards)) for p in params)

    def _step_together(self, group: Group, params: list[Tensor], key: object) -> None:
        """Move parameters of one layout and dtype."""
        optimizer, layout = self._optimizer, self._layouts[params[0]]
        momentum = optimizer._ready_momentum(group, params)
        for p in params:
            if self._owners[p] != layout.here:
                for name in self._own_names(p):
                    del optimizer.state[p][name]
        with optimizer._guarded(group, params) as grads:
            if group["maximize"]:
                grads = multi_tensor.neg(grads)
            updates = self._updates(group, params, grads, momentum)
            found = self._found(group, self._wholes(params, updates))
            terms = self._agreed(key, layout, params, found)
            tensors = self._given_back(params, updates, found, terms.dtype)
            scales = self._shared_scales(params, updates, found) if terms.scaled else None
            factors = [1.0 if _has_pieces(group) else optimizer.lr_factor(p.shape, group) for p in params]
            held = [_local(p) for p in params]
            # As in one process: an accelerator wants few launches, a CPU one tensor at a time in its cache.
            size = 1 if held[0].device.type == "cpu" else len(held)
            for i in range(0, len(held), size):
                part = slice(i, i + size)
                directions = Directions(tensors[part], None if scales is None else scales[part])
                _apply(held[part], directions, factors[part], group["lr"], group["weight_decay"])

    def _updates(
        self, group: Group, params: Sequence[Tensor], grads: Sequence[Tensor], momentum: float
    ) -> list[Tensor]:
        """Bring momenta up to date and return what this rank holds of the updates."""
        states = self._optimizer.state
        buffers = [
            {"momentum_buffer": _local(states[p]["momentum_buffer"])} if momentum else {} for p in params
        ]
        updates = list(grads)
        for looked_at in (True, False):
            chosen = [i for i, p in enumerate(params) if self._is_near(p) is looked_at]
            if chosen:
                # An update that another replica turns into a direction is not looked at here.
                nesterov = group["nesterov"] and looked_at
                made = _momentum(
                    [grads[i] for i in chosen], [buffers[i] for i in chosen], momentum, nesterov, None
                )
                for i, update in zip(chosen, made, strict=True):
                    updates[i] = update
        return updates

    def _is_near(self, parameter: Tensor) -> bool:
        """Whether the owner is in this rank's replica."""
        return self._owners[parameter][0] == self._layouts[parameter].here[0]

    def _dealt(self, params: Sequence[Tensor], replica: int) -> list[list[int]]:
        """Places in the list of what each shard of a replica owns."""
        dealt: list[list[int]] = [[] for _ in range(self._layouts[params[0]].sizes[1])]
        for i, p in enumerate(params):
            if self._owners[p][0] == replica:
                dealt[self._owners[p][1]].append(i)
        return dealt

    def _wholes(self, params: Sequence[Tensor], updates: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The updates, put together, of the parameters that this rank owns."""
        layout = self._layouts[params[0]]
        replica, here = layout.here
        dealt = self._dealt(params, replica)
        mine = [params[i] for i in dealt[here]]
        if layout.shards is None:
            return {params[i]: updates[i] for i in dealt[here]}
        rows = [rows_of_shards(p.shape[0], len(dealt)) for p in mine]
        parts = _all_to_all(
            [[updates[i] for i in places] for places in dealt],
            [
                [(cut[shard], *p.shape[1:]) for p, cut in zip(mine, rows, strict=True)]
                for shard in range(len(dealt))
            ],
            updates[0],
            layout.shards,
        )
        return {p: torch.cat(pieces) for p, *pieces in zip(mine, *parts, strict=True)}

    def _found(
        self, group: Group, wholes: dict[Tensor, Tensor]
    ) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
        """What the rule makes of updates: a direction for each parameter, and its scale."""
        optimizer = self._optimizer
        found: dict[Tensor, tuple[Tensor, Tensor | None]] = {}
        for batch in optimizer._batches(group, list(wholes)) if wholes else []:
            updates = [wholes[p] for p in batch]
            states = [optimizer.state[p] for p in batch]
            if _has_pieces(group):
                dtype = torch.promote_types(updates[0].dtype, torch.float32)
                tensors = [torch.zeros_like(update, dtype=dtype) for update in updates]
                optimizer._move_pieces(tensors, updates, states, group, self._write)
                found.update((p, (tensor, None)) for p, tensor in zip(batch, tensors, strict=True))
                continue
            tensors, scales = optimizer._shaped_directions(updates, states, group)
            for i, (p, tensor) in enumerate(zip(batch, tensors, strict=True)):
                if isinstance(tensor, LowRank):
                    tensor = (tensor.left @ tensor.right).view(p.shape)
                found[p] = tensor, None if scales is None else scales[i]
        return found

    def _write(
        self, targets: Sequence[Tensor], updates: Sequence[Tensor], states: Sequence[State], group: Group
    ) -> None:
        """Set targets, which are 0, to directions times scales and factors."""
        directions = self._optimizer._shaped_directions(updates, states, group)
        factors = [self._optimizer.lr_factor(target.shape, group) for target in targets]
        _apply(targets, directions, factors, -1.0, 0.0)

    def _agreed(
        self,
        key: object,
        layout: Layout,
        params: Sequence[Tensor],
        found: dict[Tensor, tuple[Tensor, Tensor | None]],
    ) -> _Terms:
        """Terms that hold from the first exchange on; where they do not fit, later results are converted."""
        keeps_state = any(self._own_names(p) for p in found)
        if key not in self._terms:
            scaled = any(scale is not None for _, scale in found.values())
            dtypes = {tensor.dtype for tensor, _ in found.values()}
            flags = torch.tensor(
                [scaled, keeps_state, *(dtype in dtypes for dtype in _DTYPES)], dtype=torch.int
            )
            flags = flags.to(_local(params[0]).device)
            for group in layout:
                if group is not None:
                    dist.all_reduce(flags, dist.ReduceOp.MAX, group)
            scaled, kept, *seen = flags.tolist()
            dtype = functools.reduce(torch.promote_types, itertools.compress(_DTYPES, seen))
            self._terms[key] = _Terms(dtype, bool(scaled), bool(kept))
        if keeps_state and not self._terms[key].keeps_state:
            raise RuntimeError(
                f"{type(self._optimizer).__name__} keeps state of its own now, but kept none at the first step, from "
                "which other ranks know what belongs to a checkpoint; set such state up at the first step"
            )
        return self._terms[key]

    def _given_back(
        self,
        params: Sequence[Tensor],
        updates: Sequence[Tensor],
        found: dict[Tensor, tuple[Tensor, Tensor | None]],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """What this rank is to hold of each direction."""
        layout = self._layouts[params[0]]
        replica, here = layout.here
        results: dict[int, Tensor] = {}
        if layout.shards is None:
            results = {i: found[p][0] for i, p in enumerate(params) if p in found}
        else:
            dealt = self._dealt(params, replica)
            cuts = [
                found[params[i]][0].split(rows_of_shards(params[i].shape[0], len(dealt))) for i in dealt[here]
            ]
            outgoing = [[cut[shard] for cut in cuts] for shard in range(len(dealt))]
            incoming = [[tuple(updates[i].shape) for i in places] for places in dealt]
            parts = _all_to_all(outgoing, incoming, updates[0].new_empty(0, dtype=dtype), layout.shards)
            for places, received in zip(dealt, parts, strict=True):
                results.update(zip(places, received, strict=True))
        if layout.replicas is not None:
            shapes: list[dict[int, tuple[int, ...]]] = [{} for _ in range(layout.sizes[0])]
            for i, p in enumerate(params):
                shapes[self._owners[p][0]][i] = tuple(updates[i].shape)
            mine = [results[i] for i in shapes[replica]]
            like = updates[0].new_empty(0, dtype=dtype)
            parts = _all_gather(mine, [list(s.values()) for s in shapes], like, layout.replicas)
            for of_replica, received in zip(shapes, parts, strict=True):
                results.update(zip(of_replica, received, strict=True))
        return [results[i].to(dtype) for i in range(len(params))]

    def _shared_scales(
        self,
        params: Sequence[Tensor],
        updates: Sequence[Tensor],
        found: dict[Tensor, tuple[Tensor, Tensor | None]],
    ) -> list[Tensor]:
        """The scale of each direction: exact, since all ranks but the owner add 0."""
        like = updates[0].new_empty(0, dtype=torch.promote_types(updates[0].dtype, torch.float32))
        own = {p: like.new_ones(()) if scale is None else scale.to(like) for p, (_, scale) in found.items()}
        scales = torch.stack([own[p] if p in own else like.new_zeros(()) for p in params])
        for group in self._layouts[params[0]]:
            if group is not None:
                dist.all_reduce(scales, group=group)
        return list(scales.unbind())

    def _own_names(self, parameter: Tensor) -> list[str]:
        """What of a parameter's state is the rule's own."""
        own_momentum = self._optimizer.has_own_momentum
        return [
            name for name in self._optimizer.state[parameter] if own_momentum or name != "momentum_buffer"
        ]

    def _states_of_owners(self) -> dict[int, State]:
        """What rules keep of every parameter, by its place in a state dict. All ranks call it together."""
        self._deal()
        order = [p for group in self._optimizer.param_groups for p in group["params"]]
        by_layout: dict[tuple[str, str], dict[int, State]] = {}
        for i, p in enumerate(order):
            if p in self._owners:
                kept = by_layout.setdefault(self._layouts[p].key, {})
                names = self._own_names(p) if self._owners[p] == self._layouts[p].here else []
                if names:
                    kept[i] = {
                        name: _moved(self._optimizer.state[p][name], torch.device("cpu")) for name in names
                    }
        layouts = {layout.key: layout for layout in self._layouts.values()}
        collected: dict[int, State] = {}
        for key, kept in by_layout.items():
            for group in layouts[key]:
                if group is not None:
                    gathered: list[dict[int, State]] = [{}] * _size(group)
                    dist.all_gather_object(gathered, kept, group)
                    kept = {i: state for part in gathered for i, state in part.items()}
            for i, state in kept.items():
                collected[i] = _moved(state, _local(order[i]).device)
        return collected

    def _completed(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Add to a state dict what other ranks keep."""
        if not any(terms.keeps_state for terms in self._terms.values()):
            return None
        collected = self._states_of_owners() if self._collected is None else self._collected
        state = dict(state_dict["state"])
        for i, kept in collected.items():
            state[i] = {**state.get(i, {}), **kept}
        return {**state_dict, "state": dict(sorted(state.items()))}


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _has_pieces(group: Group) -> bool:
    return bool(group["stacked"]) or group["split"] is not None


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _name(group: dist.ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


def _pack(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy tensors into a flat one, one after the other."""
    if tensors:
        multi_tensor.copy_(_unpack(flat, [tensor.shape for tensor in tensors]), tensors)


def _unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(tuple(shape)) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def _all_to_all(
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Sequence[int]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send a list of tensors to each rank and receive one of given shapes from each."""
    sent = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
    awaited = [sum(math.prod(shape) for shape in shapes) for shapes in incoming]
    received, packed = like.new_empty(sum(awaited)), like.new_empty(sum(sent))
    _pack(packed, [tensor for tensors in outgoing for tensor in tensors])
    dist.all_to_all_single(received, packed, awaited, sent, group)
    return [_unpack(part, shapes) for part, shapes in zip(received.split(awaited), incoming, strict=True)]


def _all_gather(
    mine: Sequence[Tensor],
    incoming: Sequence[Sequence[Sequence[int]]],
    like: Tensor,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Send a list of tensors to all ranks and receive the lists of each, of given shapes."""
    sizes = [sum(math.prod(shape) for shape in shapes) for shapes in incoming]
    longest = max(sizes)
    received, packed = like.new_empty(longest * len(sizes)), like.new_empty(longest)
    _pack(packed[: sizes[_rank(group)]], mine)
    _gather_into(received, packed, group=group)
    parts = [part[:size] for part, size in zip(received.split(longest), sizes, strict=True)]
    return [_unpack(part, shapes) for part, shapes in zip(parts, incoming, strict=True)]


# Renamed in PyTorch 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
