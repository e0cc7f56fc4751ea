"""The base of optimizers that move weight matrices by a rule of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from weightlab.optim import multi_tensor
from weightlab.optim.gradients import refuse_sparse
from weightlab.optim.matrix_pieces import Split, piece_sizes, pieces
from weightlab.optim.parameter_split import is_matrix_name

if TYPE_CHECKING:
    from weightlab.optim.distributed import Sharing

ApplyTo = Literal["matrices", "all"]
NonFinite = Literal["ignore", "raise", "skip"]
Group = dict[str, Any]


class AdamWOptions(TypedDict, total=False):
    """Options of the AdamW that moves what the matrix rule does not take.

    Attributes:
        lr: Learning rate. Default 3e-4. Schedulers scale it together with the rule's.
        betas: Decay rates of the two moments. Default (0.9, 0.95).
        eps: Added to the root of the second moment. Default 1e-8.
        weight_decay: Decoupled weight decay. Default 0: vectors and embeddings are not decayed.
        fused: As in `torch.optim.AdamW`; the fastest choice where it is supported. Default None.
        capturable: As in `torch.optim.AdamW`: steps are counted on the device. Default False.
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    fused: bool | None
    capturable: bool


class MatrixOptions(TypedDict, total=False):
    """What every `MatrixOptimizer` takes about its parameters and gradients, all of it off by default.

    Attributes:
        stacked: Parameters with three or more dimensions are stacks of matrices. Default False.
        split: How a parameter is cut into several matrices, e.g. fused Q, K and V. Default None.
        nonfinite: What to do about NaN and infinity in gradients. Default `"ignore"`.
    """

    stacked: bool
    split: Split | None
    nonfinite: NonFinite


class LowRank(NamedTuple):
    """An m×n direction given as the product of an m×r and an r×n matrix, to be subtracted without being formed.

    Both factors have the dtype that the parameter is moved in: its own, float32 for half precision.
    """

    left: Tensor
    right: Tensor


class Directions(NamedTuple):
    """What a rule makes of a list of updates: `tensors[i] · scales[i]` is to be subtracted.

    Attributes:
        tensors: One for each update, of the same shape. May be the updates themselves. All of them may
            be `LowRank` instead.
        scales: A 0-dim float32 or float64 tensor for each, on its device; `None` for one. A rule that
            only rescales its input returns the factor here and saves a pass over memory.
    """

    tensors: Sequence[Tensor] | Sequence[LowRank]
    scales: Sequence[Tensor] | None = None


class MatrixOptimizer(Optimizer):
    """Momentum, a rule that turns momentum into a direction, decoupled decay; AdamW for the rest.

    A subclass writes its rule and nothing else::

        class Sign(MatrixOptimizer):
            def __init__(self, params, lr=1e-3, momentum=0.9, *, adamw=None, **options):
                super().__init__(params, {"lr": lr, "momentum": momentum}, adamw=adamw, **options)

            def direction(self, update, group):
                return update.sign()

    For a parameter W with gradient G and buffer M (zeros at first), a step is

        M ← β·M + (1 − β)·G                 U = (1 − β)·G + β·M if nesterov else M
        W ← (1 − lr·weight_decay)·W         W ← W − lr·lr_factor(shape)·direction(U)

    Nothing is read back to the host on the way. The gradient is never written to.

    **Which parameters the rule takes.** With `apply_to="matrices"`, those with two or more dimensions,
    except where names are known (`model.named_parameters()`) and `is_matrix_name` calls it an embedding,
    a head or a bias. With `apply_to="all"`, every one. A group's `use_matrix_rule=True/False` settles it
    for the whole group; see `split_named_parameters` for making such groups. A group without it that
    holds both kinds becomes two groups, so that schedulers scale both learning rates; options of the
    given group are then the rule's, and its `adamw` entry those of AdamW.

    **Parameters that hold several matrices.** Two options, of a group or of all, both off by default, let the rule
    see each by itself, with a learning-rate factor of its own:

    - `stacked=True`: parameters with three or more dimensions are stacks `(..., m, n)`, such as the experts of a
      mixture, rather than kernels.
    - `split=(4096, 1024, 1024)` cuts a matrix into blocks of so many rows, e.g. fused Q, K and V;
      `split={"parts": 96}` into equal ones, e.g. one for each head of each; `{"parts": 3, "dim": 1}` cuts columns.

    **Gradients that are not finite.** The option `nonfinite`, of a group or of all, says what to do:

    - `"ignore"` (default): nothing. NaN spreads to the parameter it belongs to.
    - `"raise"`: raise ValueError with the parameter's name before anything moves. Reads one flag a
      parameter back to the host.
    - `"skip"`: leave such parameters and their state as they are, move the others. Costs a copy of weights and
      state; decided on the device (except where AdamW counts steps on the host: `capturable=True` avoids
      that). Plain numbers that a rule keeps in its state do move on.

    **State.** `momentum_buffer` for the rule (none if momentum is 0), AdamW's own for the rest. What a rule
    keeps besides comes back from a state dict in the dtype it was saved in. State dicts hold tensors and plain
    values only and load with `torch.load(..., weights_only=True)`.

    Args:
        params: Parameters, `(name, parameter)` pairs, or dicts of groups of either.
        defaults: Options of the rule. `lr` is required; `momentum` (0), `nesterov` (False),
            `weight_decay` (0), `maximize` (False) and `foreach` (None) are filled in.
        apply_to: Which parameters the rule takes when a group does not say.
        adamw: Options of AdamW for the others; see `AdamWOptions`.
        **options: `stacked`, `split` and `nonfinite`; see `MatrixOptions`.

    Raises:
        TypeError: For a module instead of parameters; complex or integer parameters; an unknown option; at
            `step`, sparse gradients.
        ValueError: For options out of range, and for splits that do not fit a parameter.
    """

    flatten: bool = True
    """Give the rule parameters with three or more dimensions as matrices (trailing ones flattened)."""

    takes_vectors: bool = True
    """Whether the rule makes sense of parameters with fewer than two dimensions; if not, they are refused."""

    has_own_momentum: bool = False
    """Give the rule gradients; what it makes of the option `momentum` is its own business."""

    sharing: Sharing | None = None
    """How ranks share the rule's work; see `distribute`."""

    def __init__(
        self,
        params: ParamsT,
        defaults: Mapping[str, Any],
        *,
        apply_to: ApplyTo = "matrices",
        adamw: AdamWOptions | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        unknown = sorted(set(options) - MatrixOptions.__optional_keys__)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(unknown)}")
        if isinstance(params, nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, not a module ({type(params).__name__}); "
                "pass model.named_parameters() or model.parameters()"
            )
        if apply_to not in ("matrices", "all"):
            raise ValueError(f'apply_to must be "matrices" or "all", got {apply_to!r}')
        own = {"apply_to": apply_to, "adamw": {**_ADAMW_DEFAULTS, **_checked_adamw(adamw or {})}}
        super().__init__(params, {**_DEFAULTS, **defaults, **options, **own})

    def direction(self, update: Tensor, group: Group) -> Tensor:
        """Turn updates into a direction of descent; the rule of most methods.

        Args:
            update: Shape `(..., m, n)` where `batches_equal_shapes` stacks matrices, else the shape of
                one parameter or piece of one (as a matrix where `flatten` holds), in the parameter's
                dtype. Not to be written to, nor kept.
            group: The group's options.

        Returns:
            A tensor of the same shape, of any floating dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must define direction or directions")

    def directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """Turn a list of updates on one device and of one dtype into directions.

        Override it instead of `direction` for a rule with state of its own, with a `foreach` form, or
        whose result is its input times a number.

        Args:
            updates: As in `direction`, not stacked. Not to be written to.
            states: A dict for each update, to keep tensors and plain values in.
            group: The group's options.
        """
        return Directions(self.each_direction(updates, group))

    def each_direction(self, updates: Sequence[Tensor], group: Group) -> Sequence[Tensor]:
        """Give every update to `direction`, in one stack where `batches_equal_shapes` holds."""
        if len(updates) > 1 and self.batches_equal_shapes(group):
            return self.direction(torch.stack(list(updates)), group).unbind()
        return [self.direction(update, group) for update in updates]

    def batches_equal_shapes(self, group: Group) -> bool:
        """Whether the rule wants updates of equal shape stacked into one call."""
        return False

    def stacking_shape(self, shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
        """What updates must share to come to `directions` together where `batches_equal_shapes` holds.

        Their own shape. A rule that can transpose or pad them to a common shape names that one here, and
        does so in `directions`.
        """
        return shape

    def lr_factor(self, shape: Sequence[int], group: Group) -> float:
        """Factor on the learning rate for a parameter of this shape."""
        return 1.0

    def cost(self, shape: Sequence[int], group: Group) -> float:
        """About how much arithmetic the rule does on a parameter of this shape, in any unit.

        Ranks that share the work balance it by this. Where it is 0, the rule costs no more than reading the
        parameter, and each rank that has it whole moves it by itself. Default: m²·n for matrices, m ≤ n, 0 for
        vectors.
        """
        views = pieces(torch.empty(tuple(shape), device="meta"), group["split"], group["stacked"])
        sides = [(view.shape[0], math.prod(view.shape[1:])) for view in views if view.ndim > 1]
        return float(sum(min(m, n) * m * n for m, n in sides))

    def keeps_group_together(self, group: Group) -> bool:
        """Whether the rule must see all parameters of a group in one call, on one rank."""
        return False

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range. Subclasses add their own and call this one."""
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"a tensor lr must hold one element, got shape {tuple(lr.shape)}")
        elif not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if group["nonfinite"] not in ("ignore", "raise", "skip"):
            raise ValueError(f'nonfinite must be "ignore", "raise" or "skip", got {group["nonfinite"]!r}')

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as two if it holds parameters for the rule and for AdamW both."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        if isinstance(group["params"], set):
            raise TypeError("a set of parameters has no order to match a saved state by; pass a list")
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        for entry in group["params"]:
            self._check_parameter(entry)
        options = {**self.defaults["adamw"], **_checked_adamw(group.pop("adamw", {}))}

        if group.get("use_matrix_rule") is not None:
            parts = [group]
        else:
            taken = [self._takes(entry) for entry in group["params"]]
            parts = [
                {**group, "params": chosen, "use_matrix_rule": rule}
                for rule in (True, False)
                if (chosen := [e for e, t in zip(group["params"], taken, strict=True) if t is rule])
            ] or [{**group, "use_matrix_rule": True}]
            for part in parts:
                if not part["use_matrix_rule"]:
                    for option in options:
                        part.pop(option, None)

        for part in parts:
            whole = {**self.defaults, **part}
            if part.get("use_matrix_rule") is False:
                part = {**options, **part}
                part["betas"] = tuple(part["betas"])
                whole |= part
            else:
                for entry in part["params"]:
                    shape = (entry[1] if isinstance(entry, tuple) else entry).shape
                    if len(shape) < 2 and not self.takes_vectors:
                        raise ValueError(
                            f"{type(self).__name__}'s rule takes matrices, got a parameter of shape {tuple(shape)}; "
                            'leave it to AdamW (apply_to="matrices", or a group with use_matrix_rule=False)'
                        )
                    piece_sizes(shape, whole["split"], whole["stacked"])
                    self._check_layout(entry)
            self.check_group(whole)
            super().add_param_group(part)
            for internal in ("adamw", "apply_to"):
                part.pop(internal)

    def _check_parameter(self, entry: Tensor | tuple[str, Tensor]) -> None:
        parameter = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{type(self).__name__} takes tensors or (name, tensor) pairs, got {type(parameter).__name__}"
            )
        if not parameter.is_floating_point():
            name = f" {entry[0]!r}" if isinstance(entry, tuple) else ""
            raise TypeError(
                f"{type(self).__name__} moves real floating-point parameters, got parameter{name} of "
                f"{parameter.dtype} and shape {tuple(parameter.shape)}; give it to another optimizer"
            )

    def _check_layout(self, entry: Tensor | tuple[str, Tensor]) -> None:
        name, parameter = entry if isinstance(entry, tuple) else ("a parameter", entry)
        if _is_distributed(parameter):
            from weightlab.optim.distributed import layout_of

            layout_of(parameter, name)

    def _takes(self, entry: Tensor | tuple[str, Tensor]) -> bool:
        if self.defaults["apply_to"] == "all":
            return True
        if isinstance(entry, tuple):
            return entry[1].ndim >= 2 and is_matrix_name(entry[0])
        return entry.ndim >= 2

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss, which `step` returns then.

        Raises:
            TypeError: If a gradient is sparse; no parameter has moved then.
            ValueError: If a gradient holds NaN or infinity in a group with `nonfinite="raise"`; no
                parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        work = [
            (group, [p for p in group["params"] if p.grad is not None and p.numel() > 0])
            for group in self.param_groups
        ]
        for _, params in work:
            for p in params:
                refuse_sparse(self, p)
                if _is_distributed(p):
                    _check_placements(p)
        self._raise_for_nonfinite(work)
        for group, params in work:
            if params and group["use_matrix_rule"]:
                self._rule_step(group, params)
            elif params:
                self._adamw_step(group, params)
        return loss

    def _raise_for_nonfinite(self, work: Sequence[tuple[Group, list[Tensor]]]) -> None:
        watched = [(group, p) for group, params in work if group["nonfinite"] == "raise" for p in params]
        by_device: dict[torch.device, list[tuple[Group, Tensor]]] = {}
        for group, p in watched:
            by_device.setdefault(p.device, []).append((group, p))
        for entries in by_device.values():
            finite = torch.stack(_finite([_grad(p) for _, p in entries])).tolist()
            bad = [entry for entry, good in zip(entries, finite, strict=True) if not good]
            if bad:
                names = ", ".join(_label(group, p) for group, p in bad[:8])
                raise ValueError(
                    f"{len(bad)} gradient(s) hold NaN or infinity: {names}{', ...' if len(bad) > 8 else ''}; "
                    'lower the learning rate, clip gradients, or set nonfinite="skip"'
                )

    @contextmanager
    def _guarded(self, group: Group, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Give the gradients to step by; with `nonfinite="skip"`, undo the step where they are not finite."""
        grads = [_local(_grad(p)) for p in params]
        if group["nonfinite"] != "skip":
            yield grads
            return
        finite = _finite([_grad(p) for p in params])
        before = [(_local(p).clone(), _clone(self.state[p])) for p in params]
        # Zeros keep NaN out of whatever a rule sets up at its first step.
        yield [torch.where(good, g, 0) for good, g in zip(finite, grads, strict=True)]
        for p, good, (old, old_state) in zip(params, finite, before, strict=True):
            _local(p).copy_(torch.where(good, _local(p), old))
            self.state[p].update(_chosen(good, self.state[p], old_state))

    def _share(self, params: Sequence[Tensor]) -> Sharing | None:
        if self.sharing is None and any(_is_distributed(p) for p in params):
            from weightlab.optim.distributed import Sharing

            self.sharing = Sharing(self)
        return self.sharing

    def _ready_momentum(self, group: Group, params: Sequence[Tensor]) -> float:
        """Set up the buffers that are missing and return their decay; 0 if there are to be none."""
        momentum = 0.0 if self.has_own_momentum else group["momentum"]
        for p in params if momentum != 0 else ():
            if "momentum_buffer" not in self.state[p]:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["momentum_buffer"] = zeros
        return momentum

    def _rule_step(self, group: Group, params: list[Tensor]) -> None:
        sharing = self._share(params)
        if sharing is not None:
            params = sharing.step(group, params)
        for batch in self._batches(group, params) if params else []:
            momentum = self._ready_momentum(group, batch)
            states = [self.state[p] for p in batch]
            with self._guarded(group, batch) as grads:
                if group["maximize"]:
                    grads = multi_tensor.neg(grads)
                out = self._scratch(batch[0]) if len(batch) == 1 else None
                updates = _momentum(grads, states, momentum, group["nesterov"], out)
                if group["stacked"] or group["split"] is not None:
                    self._move_pieces(batch, updates, states, group, self._move)
                else:
                    self._move(batch, updates, states, group)

    def _move_pieces(
        self,
        params: Sequence[Tensor],
        updates: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        group: Group,
        move: Callable[..., None],
    ) -> None:
        """`move` the matrices that the parameters hold; what the rule keeps of them goes under `pieces`."""
        split, stacked = group["split"], group["stacked"]
        targets = [pieces(p, split, stacked) for p in params]
        kept = [
            state.pop("pieces", None) or [{} for _ in views]
            for state, views in zip(states, targets, strict=True)
        ]
        flat_targets = [view for views in targets for view in views]
        flat_updates = [view for update in updates for view in pieces(update, split, stacked)]
        flat_states = [piece for piece_states in kept for piece in piece_states]
        together: dict[object, list[int]] = {}
        by_shape = self.batches_equal_shapes(group)
        for i, target in enumerate(flat_targets):
            together.setdefault(self._stacking_key(target, group) if by_shape else None, []).append(i)
        for chosen in together.values():
            move(
                [flat_targets[i] for i in chosen],
                [flat_updates[i] for i in chosen],
                [flat_states[i] for i in chosen],
                group,
            )
        for state, piece_states in zip(states, kept, strict=True):
            if any(piece_states):
                state["pieces"] = piece_states

    def _move(
        self,
        targets: Sequence[Tensor],
        updates: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        group: Group,
    ) -> None:
        """Step weights, of one device and dtype, by what the rule makes of their updates."""
        directions = self._shaped_directions(updates, states, group)
        factors = [self.lr_factor(p.shape, group) for p in targets]
        _apply(targets, directions, factors, group["lr"], group["weight_decay"])

    def _shaped_directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """`directions` for updates of any shape; what comes back has the shapes of the updates."""
        if not self.flatten:
            return self.directions(updates, states, group)
        matrices = [u.flatten(1) if u.ndim > 2 else u for u in updates]
        tensors, scales = self.directions(matrices, states, group)
        if not isinstance(tensors[0], LowRank):
            dense = cast(Sequence[Tensor], tensors)
            tensors = [t.reshape(u.shape) if u.ndim > 2 else t for t, u in zip(dense, updates, strict=True)]
        return Directions(tensors, scales)

    def _stacking_key(self, tensor: Tensor, group: Group) -> tuple[int, ...]:
        shape = tuple(tensor.shape)
        if self.flatten and len(shape) > 2:
            shape = (shape[0], math.prod(shape[1:]))
        return self.stacking_shape(shape, group)

    def _batches(self, group: Group, params: list[Tensor]) -> list[list[Tensor]]:
        """Parameters to be moved together, of one device and dtype: equal shapes, or all, or a cacheful.

        An accelerator wants few launches. A CPU wants a tensor to be still in the cache when the next
        operation comes to it: large ones alone, small ones together.
        """
        by_shape = self.batches_equal_shapes(group)
        batches: dict[object, list[Tensor]] = {}
        small = 0
        for p in params:
            foreach = group["foreach"]
            if foreach is None:
                foreach = p.device.type != "cpu" and type(p) in (Tensor, nn.Parameter)
            key: tuple[object, ...] = (p.device, p.dtype)
            if by_shape:
                key += (group["stacked"] and p.ndim > 2, *self._stacking_key(p, group))
            elif not foreach:
                small += min(p.numel(), _CACHEFUL)
                key += (small // _CACHEFUL,) if p.numel() < _CACHEFUL else (id(p),)
            batches.setdefault(key, []).append(p)
        return list(batches.values())

    def _scratch(self, like: Tensor) -> Tensor | None:
        """A buffer kept from step to step, as large as the largest parameter, for CPU tensors.

        Fresh memory costs a page fault every few kilobytes there, more than the arithmetic on it.
        Accelerators have caching allocators.
        """
        if like.device.type != "cpu" or type(like) not in (Tensor, nn.Parameter):
            return None
        kept: dict[torch.dtype, Tensor] = self.__dict__.setdefault("_kept", {})
        if like.dtype not in kept or kept[like.dtype].numel() < like.numel():
            kept[like.dtype] = torch.empty(like.numel(), dtype=like.dtype)
        return kept[like.dtype][: like.numel()].view(like.shape)

    def _adamw_step(self, group: Group, params: list[Tensor]) -> None:
        on_device = bool(group["capturable"] or group["fused"])
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        with self._guarded(group, params) as grads:
            adamw(
                [_local(p) for p in params],
                grads,
                [_local(self.state[p]["exp_avg"]) for p in params],
                [_local(self.state[p]["exp_avg_sq"]) for p in params],
                [],
                [self.state[p]["step"] for p in params],
                foreach=None if group["fused"] else group["foreach"],
                capturable=group["capturable"],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same parameters in the same groups.

        Raises:
            ValueError: If groups, or shapes of buffers, do not match; the message names them, and
                nothing has changed then.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] == [len(group["params"]) for group in saved_groups]:
            self._check_state(state_dict)
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for p, index in zip(group["params"], saved_group["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if key not in _BUFFERS:
                        self.state[p][key] = _moved(value, p.device)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            if saved.get("use_matrix_rule") is not group["use_matrix_rule"]:
                raise ValueError(
                    f"parameter group {i} has use_matrix_rule={group['use_matrix_rule']}, the state to load "
                    f"{saved.get('use_matrix_rule')}; build the groups as they were when it was saved"
                )
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if key in _BUFFERS and key != "step" and value.shape != p.shape:
                        raise ValueError(
                            f"{key} to load has shape {tuple(value.shape)}, but {_label(group, p)} has shape "
                            f"{tuple(p.shape)}; build the groups as they were when it was saved"
                        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in _DEFAULTS.items():
                group.setdefault(option, value)


# Entries of small tensors that are moved together on a CPU: half a megabyte in float32.
_CACHEFUL = 2**17

_DEFAULTS: Mapping[str, Any] = {
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "maximize": False,
    "foreach": None,
    "stacked": False,
    "split": None,
    "nonfinite": "ignore",
}

# State that has its parameter's shape and, but for the count, its dtype.
_BUFFERS = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "step"})

_ADAMW_DEFAULTS: AdamWOptions = {
    "lr": 3e-4,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "fused": None,
    "capturable": False,
}


def _checked_adamw(options: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(set(options) - set(_ADAMW_DEFAULTS))
    if unknown:
        raise ValueError(f"adamw knows the options {', '.join(_ADAMW_DEFAULTS)}, got {', '.join(unknown)}")
    betas = options.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw betas must be two numbers in [0, 1), got {betas}")
    if not options.get("eps", 0.0) >= 0:
        raise ValueError(f"adamw eps must be at least 0, got {options['eps']}")
    return options


def _grad(parameter: Tensor) -> Tensor:
    return cast(Tensor, parameter.grad)


def _label(group: Group, parameter: Tensor) -> str:
    place = next(i for i, p in enumerate(group["params"]) if p is parameter)
    if "param_names" in group:
        return repr(group["param_names"][place])
    return f"parameter {place} of its group, of shape {tuple(parameter.shape)}"


def _is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; `isinstance` would import what a single device has no use for."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "to_local")


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a `DTensor`; any other tensor itself."""
    return cast(Any, tensor).to_local() if _is_distributed(tensor) else tensor


def _check_placements(parameter: Tensor) -> None:
    placed, grad = cast(Any, parameter), cast(Any, parameter.grad)
    if not _is_distributed(grad) or grad.placements != placed.placements:
        raise TypeError(
            f"a gradient must be placed as its parameter is, got {getattr(grad, 'placements', 'a plain tensor')} "
            f"for a parameter of shape {tuple(parameter.shape)} placed {placed.placements}; "
            "reduce gradients before the step, e.g. by grad.redistribute(placements=parameter.placements)"
        )


def _finite(grads: Sequence[Tensor]) -> list[Tensor]:
    """Whether each gradient is finite, on whatever rank its parts are: 0-dim, on the device."""
    held = [_local(g) for g in grads]
    flags = [
        torch.linalg.vector_norm(g, math.inf).isfinite() if g.numel() else g.new_ones((), dtype=torch.bool)
        for g in held
    ]
    if any(_is_distributed(g) for g in grads):
        from weightlab.optim.distributed import all_agree

        return all_agree(flags, grads)
    return flags


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _local(value).clone()
    if isinstance(value, dict):
        return {key: _clone(part) for key, part in value.items()}
    return [_clone(part) for part in value] if isinstance(value, list) else value


def _chosen(good: Tensor, new: Any, old: Any) -> Any:
    """`new` where `good`, else `old`, tensor by tensor, in the tensors of `new`; what is new stays."""
    if isinstance(new, dict):
        return {key: _chosen(good, part, old[key]) if key in old else part for key, part in new.items()}
    if isinstance(new, list) and len(new) == len(old):
        return [_chosen(good, part, before) for part, before in zip(new, old, strict=True)]
    if isinstance(new, Tensor):
        held = _local(new)
        if held.shape == old.shape:
            held.copy_(torch.where(good.to(held.device), held, old))
    return new


def _moved(value: Any, device: torch.device) -> Any:
    """Copy what a rule keeps to a device; dtypes stay."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return [_moved(part, device) for part in value] if isinstance(value, list) else value


def _momentum(
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    momentum: float,
    nesterov: bool,
    out: Tensor | None,
) -> Sequence[Tensor]:
    """Update the buffers in the states and return the updates: new, or the buffers, or the gradients.

    `out` takes the update where there is only one and it is neither buffer nor gradient.
    """
    if momentum == 0:
        return grads
    buffers = [state["momentum_buffer"] for state in states]
    multi_tensor.lerp_(buffers, grads, 1 - momentum)
    if not nesterov:
        return buffers
    if out is not None:
        return [torch.lerp(grads[0], buffers[0], momentum, out=out)]
    return multi_tensor.lerp(grads, buffers, momentum)


def _apply(
    params: Sequence[Tensor],
    directions: Directions,
    factors: Sequence[float],
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """Set each parameter to `(1 − lr·weight_decay)·p − lr·factor·scale·direction`."""
    tensors, scales = directions
    if isinstance(tensors[0], LowRank):
        pairs = cast(Sequence[LowRank], tensors)
        _apply_low_rank(params, pairs, scales, factors, lr, weight_decay)
    else:
        _apply_dense(params, cast(Sequence[Tensor], tensors), scales, factors, lr, weight_decay)


def _apply_dense(
    params: Sequence[Tensor],
    directions: Sequence[Tensor],
    scales: Sequence[Tensor] | None,
    factors: Sequence[float],
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """As `_apply`, tensors of one device and dtype together."""
    targets = params
    if torch.finfo(params[0].dtype).bits < 32:
        # In half precision 1 − lr·weight_decay rounds to 1 and a small scale to 0; round only once.
        targets = [p.float() for p in params]
        directions = [d.float() for d in directions]
    if weight_decay != 0:
        multi_tensor.mul_(targets, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        lr = lr.to(targets[0].device).reshape(())
        scales = [lr] * len(targets) if scales is None else [s * lr for s in scales]
        lr = 1.0
    steps = [-lr * factor for factor in factors]
    if scales is not None:
        multi_tensor.addcmul_(targets, directions, scales, steps)
    elif len(set(steps)) == 1:
        multi_tensor.add_(targets, directions, alpha=steps[0])
    else:
        for target, direction, step in zip(targets, directions, steps, strict=True):
            target.add_(direction, alpha=step)
    if targets is not params:
        multi_tensor.copy_(params, targets)


def _apply_low_rank(
    params: Sequence[Tensor],
    directions: Sequence[LowRank],
    scales: Sequence[Tensor] | None,
    factors: Sequence[float],
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """As `_apply`, in one pass over each parameter."""
    for i, (p, (left, right), factor) in enumerate(zip(params, directions, factors, strict=True)):
        target = p.float() if torch.finfo(p.dtype).bits < 32 else p
        if isinstance(lr, Tensor):
            if weight_decay != 0:
                target.mul_(1 - lr * weight_decay)
            left, decay, step = left * lr, 1.0, -factor
        else:
            decay, step = 1 - lr * weight_decay, -lr * factor
        if scales is not None:
            left = left * scales[i]
        if target.ndim == 2:
            target.addmm_(left, right, beta=decay, alpha=step)
        elif target.is_contiguous():
            target.view(target.shape[0], -1).addmm_(left, right, beta=decay, alpha=step)
        else:
            target.mul_(decay).add_((left @ right).view(target.shape), alpha=step)
        if target is not p:
            p.copy_(target)
