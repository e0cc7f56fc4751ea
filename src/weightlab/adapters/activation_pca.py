"""Principal components of what flows into layers, gathered by hooks while a model runs."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.linalg.incremental_pca import IncrementalPCA
from weightlab.linalg.moment_sketch import MomentSketch
from weightlab.linalg.streaming_moments import PrincipalComponents, RowStream, StreamingMoments

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed import ProcessGroup

Method = Literal["covariance", "incremental", "sketch"]
Forward = Callable[[nn.Module, Any], object]
Components = dict[str, PrincipalComponents]
_SHOW_AFTER_SECONDS = 2.0


class Pass(NamedTuple):
    """How far `ActivationPCA.fit` went: batches run, and whether it stopped because all bases had settled."""

    batches: int
    converged: bool


@dataclass(eq=False)
class _Group:
    """Layers that are fed the same tensor, with the statistics of it."""

    stream: RowStream
    members: list[str]
    rounds: int = 0
    called: set[str] = field(default_factory=set)
    tensor: weakref.ref[Tensor] | None = None
    version: int = 0
    result: tuple[int, PrincipalComponents] | None = None
    last: PrincipalComponents | None = None

    def holds(self, x: Tensor) -> bool:
        return self.tensor is not None and self.tensor() is x and self.version == _version(x)

    def begin_round(self, name: str, x: Tensor) -> None:
        self.tensor, self.version = weakref.ref(x), _version(x)
        self.called = {name}
        self.rounds += 1

    def check_round(self) -> None:
        if missing := [name for name in self.members if name not in self.called]:
            raise RuntimeError(
                f"layers {self.members} were fed one tensor at first, but {missing} no longer were; "
                "pass share_inputs=False"
            )


class ActivationPCA:
    """Gather principal components of the inputs of layers while a model runs.

    A context manager: inside, layers carry hooks and the model is in evaluation mode; when it is left,
    normally or by an exception, hooks and mask are gone and every module's training flag is back. Statistics stay, and
    entering again adds to them. Every position of an input is a row of its own, unless `mask` drops it.

    Layers that are fed the same tensor, as queries, keys and values are, share one state. They are found by
    the identity of the tensor while the model first runs, which costs nothing.

    Methods:

    - `"covariance"`: `StreamingMoments`, exact, independent of batches and their order; 8·d² bytes an input.
    - `"incremental"`: `IncrementalPCA`, which forgets what a batch adds below the components tracked.
    - `"sketch"`: `MomentSketch`, for d of many thousands; 12·d·(2k + 16) bytes an input.

    Args:
        model: Any module.
        n_components: Components to find for each layer, or a mapping from layers to numbers. More than d are
            cut to d.
        layers: Names of modules as in `model.named_modules()`: Linear, transformers' Conv1D, Conv2d of one
            group (whose rows are the patches under the kernel, as `torch.nn.functional.unfold` gives them), or
            modules with an attribute `in_features`; or wrappers around one in an attribute `base_layer`.
            Default None: all Linear, Conv1D and Conv2d.
        method: As above. Default `"covariance"`.
        center: Whether components are those around the mean. Default True, as in EVA's official code; without,
            the first one is mostly the mean's direction where that is large.
        share_inputs: Whether to look for equal inputs. Default True.
        progress: Whether what takes more than two seconds shows a bar, if there is a terminal. Default True.

    Raises:
        ValueError: If a layer is unknown, none is found, or an option is unknown or out of range.
        TypeError: If a layer is of another kind.

    References:
        Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> with ActivationPCA(model, n_components=1, layers=["0"]) as pca:
        ...     _ = model(torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.0, 1.0]]))
        >>> pca.components()["0"].directions.tolist()
        [[1.0, 0.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        n_components: int | Mapping[str, int],
        layers: Iterable[str] | None = None,
        *,
        method: Method = "covariance",
        center: bool = True,
        share_inputs: bool = True,
        progress: bool = True,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
        modules = dict(model.named_modules())
        if layers is None:
            layers = [name for name, module in modules.items() if _is_dense(module)]
        self.layers = list(layers)
        if not self.layers:
            raise ValueError("there is no layer to look at; name some in layers, e.g. ['0', 'head']")
        if unknown := [name for name in self.layers if name not in modules]:
            raise ValueError(f"layers names {unknown}, which the model does not have; see named_modules()")
        if isinstance(n_components, int):
            n_components = dict.fromkeys(self.layers, n_components)
        self.n_components = {name: n_components[name] for name in self.layers}
        if least := [name for name, k in self.n_components.items() if k < 1]:
            raise ValueError(
                f"n_components must be at least 1, got {self.n_components[least[0]]} for {least[0]!r}"
            )
        self.model, self.method, self.center, self.share_inputs = model, method, center, share_inputs
        self.progress = progress
        self._modules = {name: _inner(name, modules[name]) for name in self.layers}
        self._hooked = {name: modules[name] for name in self.layers}
        self._groups: list[_Group] = []
        self._of: dict[str, _Group] = {}
        self._mask: Tensor | None = None
        self._undo: list[Callable[[], object]] = []

    @property
    def mask(self) -> Tensor | None:
        """Which positions of the next batches count: booleans, shape `(batch,)` or `(batch, positions)`.

        None counts all. Inputs `(batch, d)` of layers behind a pooling count where any position does.
        """
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must hold booleans, got {mask.dtype}")
            if bool(mask.all()):
                mask = None
        self._mask = mask

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Layers that share an input, by the one called first."""
        return {group.members[0]: tuple(group.members) for group in self._groups}

    @property
    def counts(self) -> dict[str, int]:
        """Rows seen by each layer; 0 for those that never ran."""
        return {name: self._of[name].stream.count if name in self._of else 0 for name in self.layers}

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError("this ActivationPCA is already entered")
        for module in self.model.modules():
            self._undo.append(_flag_setter(module, module.training))
        self.model.eval()
        for name, module in self._hooked.items():
            handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            self._undo.append(handle.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._mask = None
        try:
            if kind is None:
                for group in self._groups:
                    group.check_round()
        finally:
            for group in self._groups:
                group.tensor, group.called = None, set(group.members)

    def components(self) -> Components:
        """Return the components of every layer; layers that share an input share the tensors.

        Computed anew only if rows have come in since.

        Raises:
            ValueError: If a layer never ran, saw fewer rows than it is to have components, or saw values
                that are not finite.
        """
        if missing := [name for name in self.layers if name not in self._of]:
            raise ValueError(
                f"no input reached {missing}; leave them out, or run the model so that it calls them"
            )
        with self._shown("Decomposing inputs", len(self._groups)) as advance:
            for group in self._groups:
                self._principal(group)
                advance()
        return {name: self._principal(self._of[name]) for name in self.layers}

    def converged(self, tau: float = 0.99, ranks: Mapping[str, int] | None = None) -> bool:
        """Whether no basis has turned since this was last asked.

        Compares subspaces: for each layer the mean squared cosine between the two spans,
        ‖V_new V_oldᵀ‖²/k, must reach τ², and the sum of absolute changes of ratios stay within 1 − τ². Ask after
        twice as many rows, not after each batch: as rows add up, one more batch turns nothing, right or wrong.

        Args:
            tau: Cosine in [0, 1]. Default 0.99, as in the paper's code.
            ranks: How many leading components of each layer count. Default None: all.

        Returns:
            False at the first call.
        """
        _check_tau(tau)
        done = True
        components = self.components()
        for group in self._groups:
            new, old = components[group.members[0]], group.last
            group.last = new
            k = len(new.directions)
            if ranks is not None:
                k = min(k, max(ranks[name] for name in group.members))
            done = done and old is not None and _settled(old, new, k, tau)
        return done

    def fit(
        self,
        batches: Iterable[Any],
        *,
        forward_fn: Forward | None = None,
        mask_fn: Callable[[Any], Tensor | None] | None = None,
        needed: Callable[[Components], Mapping[str, int]] | None = None,
        tau: float = 0.99,
        max_batches: int | None = None,
    ) -> Pass:
        """Run batches through the model, without gradients, until bases settle or batches end.

        Convergence is looked at after 4, 8, 16, … batches, so that each look sees twice the rows.

        Args:
            batches: Moved to the device of the model's first parameter. Gone through once.
            forward_fn: `(model, batch)`. Default None: mappings as keywords, the first entry of tuples and
                lists, anything else as it is.
            mask_fn: Gives `mask` for a batch. Default None: every position counts.
            needed: Gives, from the components so far, how many of them count for each layer. Default None: all.
            tau: As in `converged`. 1 goes through all batches.
            max_batches: At most so many. Default None: all of them; then `batches` must end.

        Raises:
            ValueError: If there are no batches, or an option is out of range; and as `components` does.
        """
        _check_tau(tau)
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1, got {max_batches}; None runs all")
        forward_fn = forward_fn or default_forward
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        total = min(
            len(batches) if isinstance(batches, Sized) else math.inf,
            math.inf if max_batches is None else max_batches,
        )
        done, look, converged = 0, 4, False
        with self, torch.no_grad(), self._shown("Reading activations", total) as advance:
            for batch in batches:
                batch = _move(batch, device)
                self.mask = mask_fn(batch) if mask_fn else None
                forward_fn(self.model, batch)
                done += 1
                advance()
                if done == max_batches:
                    break
                if done == look and done < total and tau < 1:
                    look *= 2
                    if self._enough() and self.converged(tau, needed(self.components()) if needed else None):
                        converged = True
                        break
        if done == 0:
            raise ValueError("batches is empty; give at least one batch")
        return Pass(done, converged)

    def merge(self, other: ActivationPCA) -> Self:
        """Take in what another object, of the same layers and method, has seen.

        Raises:
            ValueError: If layers, methods or groups differ.
        """
        mine, theirs = (self.method, self.groups), (other.method, other.groups)
        if mine != theirs:
            raise ValueError(f"cannot merge {theirs} into {mine}; method and groups must be the same")
        for name in self.groups:
            self._of[name].stream.merge(other._of[name].stream)
        return self

    def all_reduce(self, group: ProcessGroup | None = None) -> Self:
        """Merge what all processes of a group have seen into each of them.

        Raises:
            ValueError: On every process, if their groups of layers differ.
        """
        import torch.distributed as dist

        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (self.method, self.groups), group=group)
        if any(theirs != everyone[0] for theirs in everyone):
            raise ValueError(
                f"processes have seen different groups of layers: {everyone}; run a batch on each"
            )
        for each in self._groups:
            each.stream.all_reduce(group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return statistics as tensors and names, fit for `torch.load(..., weights_only=True)`."""
        return {
            "groups": {name: list(members) for name, members in self.groups.items()},
            "streams": {name: self._of[name].stream.state_dict() for name in self.groups},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what another object, of the same layers and method, has seen.

        Raises:
            ValueError: If the state is of other layers or another method.
        """
        members = [name for group in state["groups"].values() for name in group]
        if unknown := sorted(set(members) - set(self.layers)):
            raise ValueError(f"state has layers {unknown}, which are not looked at here")
        self._groups, self._of = [], {}
        for name, names in state["groups"].items():
            saved = state["streams"][name]
            stream = self._new_stream(saved["mean"].numel(), saved["mean"].device)
            stream.load_state_dict(saved)
            group = _Group(stream, list(names), rounds=1, called=set(names))
            self._groups.append(group)
            self._of.update(dict.fromkeys(names, group))

    def _enough(self) -> bool:
        """Whether components can be had yet."""
        return all(g.stream.count >= self._k(g) for g in self._groups) and len(self._of) == len(self.layers)

    def _k(self, group: _Group) -> int:
        return min(group.stream.dim, max(self.n_components[name] for name in group.members))

    def _principal(self, group: _Group) -> PrincipalComponents:
        k, count = self._k(group), group.stream.count
        if group.result is not None and group.result[0] == count:
            return group.result[1]
        name = group.members[0]
        if count < k:
            raise ValueError(
                f"layer {name!r} saw {count} rows, fewer than its {k} components; give more batches or ask for fewer"
            )
        try:
            found = group.stream.principal(k, center=self.center)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        group.result = (count, found)
        return found

    def _new_stream(self, dim: int, device: torch.device) -> RowStream:
        k = min(dim, max(self.n_components.values()))
        if self.method == "covariance":
            return StreamingMoments(dim, device)
        if self.method == "incremental":
            return IncrementalPCA(dim, k, device)
        return MomentSketch(dim, k, device=device)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None or not x.is_floating_point():
                given = type(x).__name__ if x is None else str(x.dtype)
                raise TypeError(f"layer {name!r} must be fed a real floating-point tensor, got {given}")
            self._observe(name, x)

        return hook

    def _observe(self, name: str, x: Tensor) -> None:
        group = self._of.get(name)
        if group is None:
            if (group := self._sharing(x)) is not None:
                group.members.append(name)
                group.called.add(name)
                self._of[name] = group
                return
            rows = self._rows(name, x)
            group = self._of[name] = _Group(self._new_stream(rows.shape[-1], rows.device), [name])
            self._groups.append(group)
        elif name not in group.called and group.holds(x):
            group.called.add(name)
            return
        else:
            group.check_round()
            rows = self._rows(name, x)
        group.begin_round(name, x)
        group.stream.update(rows)

    def _sharing(self, x: Tensor) -> _Group | None:
        if not self.share_inputs:
            return None
        return next((group for group in self._groups if group.rounds == 1 and group.holds(x)), None)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Rows `(..., d)` of a layer's input, those that the mask drops left out."""
        layer, mask, x = self._modules[name], self._mask, x.detach()
        if isinstance(layer, nn.Conv2d):
            x = _patches(layer, x)
        if mask is None:
            return x
        lead = x.shape[:-1]
        if lead[: mask.ndim] == mask.shape:
            return x[mask]
        if lead.numel() == mask.numel():
            return x.reshape(-1, x.shape[-1])[mask.flatten()]
        if len(lead) == 1 and lead[0] == mask.shape[0]:
            return x[mask.flatten(1).any(1)]
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit the input {tuple(x.shape)} of layer {name!r}; "
            "leave the layer out, or the mask"
        )

    @contextmanager
    def _shown(self, what: str, total: float) -> Iterator[Callable[[], None]]:
        """Give a function to call after each step; a bar appears once it is worth one."""
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import Progress

        console = Console(stderr=True)
        bar = Progress(console=console, transient=True) if self.progress and console.is_terminal else None
        started, done, shown = time.monotonic(), 0, False

        def advance() -> None:
            nonlocal done, shown, bar
            done += 1
            if bar is None:
                return
            if not shown and time.monotonic() - started > _SHOW_AFTER_SECONDS:
                bar.add_task(what, total=total if math.isfinite(total) else None)
                try:
                    bar.start()
                except LiveError:  # somebody else's display is on the terminal
                    bar = None
                    return
                shown = True
            if shown:
                bar.update(bar.task_ids[0], completed=done)

        try:
            yield advance
        finally:
            if bar is not None and shown:
                bar.stop()


def default_forward(model: nn.Module, batch: Any) -> object:
    """Run a batch: mappings as keywords, the first entry of tuples and lists, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _settled(old: PrincipalComponents, new: PrincipalComponents, k: int, tau: float) -> bool:
    if k == 0:
        return True
    cosines = (new.directions[:k] @ old.directions[:k].mT).square().sum() / k
    change = (new.ratios[:k] - old.ratios[:k]).abs().sum()
    return bool(cosines >= tau**2) and bool(change <= 1 - tau**2)


def _check_tau(tau: float) -> None:
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], a cosine, got {tau}; 1 uses all batches")


def _version(x: Tensor) -> int:
    # Tensors made in inference mode do not count their changes.
    return 0 if x.is_inference() else x._version


def _flag_setter(module: nn.Module, training: bool) -> Callable[[], None]:
    def put_back() -> None:
        module.training = training

    return put_back


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a Linear with its weight transposed; transformers stays unimported."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module)


def _inner(name: str, module: nn.Module) -> nn.Module:
    """The layer itself, inside wrappers."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        raise ValueError(
            f"layer {name!r} is a Conv2d of {module.groups} groups, whose parts see different inputs"
        )
    if not (_is_dense(module) or hasattr(module, "in_features")):
        raise TypeError(f"layer {name!r} is a {type(module).__name__}; it must be a Linear, Conv1D or Conv2d")
    return module


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What the kernel sees: `(n, c, h, w)` -> `(n, places, c·kh·kw)`."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x if x.ndim == 4 else x[None], layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(x, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).mT


def _move(batch: Any, device: torch.device | None) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device) if device is not None else batch
    if isinstance(batch, Mapping):
        return {name: _move(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch
