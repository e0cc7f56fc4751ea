"""Explained Variance Adaptation: LoRA started from the principal components of its layers' inputs."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from weightlab._lazy import require
from weightlab.adapters.activation_pca import ActivationPCA, Components, Forward, Method
from weightlab.adapters.rank_allocation import allocate_ranks

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from rich.table import Table

_PREFIX = "base_model.model."
# Starts of LoRA that change the base weight, to be made up for by B A, which EVA would set to nothing.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class EvaReport:
    """What `eva_init_` did. Prints as a table in terminals.

    Attributes:
        ranks: Rank of each layer, by its name in the base model; 0 where the adapter was taken away.
        explained: Share of the variance of each layer's input that the components it got explain. Empty if
            they came from a state dict.
        parameters: Adapter parameters of these layers, before and after.
        batches: Batches run.
        converged: Whether bases had settled before the batches ended.
        seconds: All of it.
        eva_state_dict: Rows of A by the layer's name in the PEFT model, in the form of PEFT's
            `get_eva_state_dict`: `initialize_lora_eva_weights(model, eva_state_dict=...)` takes it.
    """

    ranks: dict[str, int]
    explained: dict[str, float]
    parameters: tuple[int, int]
    batches: int
    converged: bool
    seconds: float
    eva_state_dict: dict[str, Tensor] = field(repr=False)

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each layer: its name, rank, and the explained share of variance."""
        return [
            {"layer": name, "rank": rank, "explained": self.explained.get(name)}
            for name, rank in self.ranks.items()
        ]

    def __rich__(self) -> Table:
        from rich.table import Table

        before, after = self.parameters
        title = (
            f"EVA: {self.batches} batches in {self.seconds:.1f} s"
            f"{', settled' if self.converged else ''}; {before:,} parameters before, {after:,} after"
        )
        table = Table("layer", title=title)
        table.add_column("rank", justify="right")
        table.add_column("explained", justify="right")
        for row in self.table():
            share = "" if row["explained"] is None else f"{row['explained']:.1%}"
            table.add_row(row["layer"], str(row["rank"]), share)
        return table


def eva_init_(
    peft_model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    *,
    rho: float = 2.0,
    method: Method = "covariance",
    center: bool = True,
    whiten: bool = False,
    tau: float = 0.99,
    max_batches: int | None = None,
    label_mask: int | None = -100,
    forward_fn: Forward | None = None,
    adjust_scaling: bool = True,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> EvaReport:
    r"""Start the LoRA adapter of a PEFT model from data, and deal its ranks anew over the layers.

    Runs batches through the frozen base model and finds the principal components of every adapted layer's
    input. Of all components, those with the largest shares of explained variance are kept, as many as ranks
    in sum; they become the rows of A, while B becomes zero, so the model's function is the base's. A layer
    without any loses its adapter. The configuration is rewritten to fit (`rank_pattern`, `alpha_pattern`,
    `target_modules`), so that what `save_pretrained` writes is a plain LoRA adapter that PEFT alone loads.

    Embeddings, grouped convolutions and other layers that are no product with their input keep their start.

    Where torch.distributed is initialised, processes run their own batches and merge d × d moments, not tokens.

    Args:
        peft_model: As `get_peft_model(model, LoraConfig(...))` gives, with one active adapter.
        dataloader: Batches: mappings, passed as keywords; tuples or lists of which the first entry is the
            input and the second one labels; or tensors. Any iterable, gone through once at most.
        rho: A layer gets at most round(ρ·r) components. 1 leaves all ranks as they are. Default 2, as in PEFT.
        method: `"covariance"`, `"incremental"` or `"sketch"`; see `ActivationPCA`. Default covariance:
            exact, 8·d² bytes for each distinct input of size d. Take sketch for d of many thousands.
        center: Whether to take the mean off. Default True, as in the official code.
        whiten: Whether to divide each row of A by the square root of its singular value, as the official code
            does. Singular values grow as the root of the number of rows seen, so A shrinks with more data;
            whitening in the proper sense would divide by the standard deviation.
        tau: Stop once subspaces turn by less than this cosine while the rows double. Default 0.99. 1
            uses all batches.
        max_batches: At most so many. Default None: as many as there are; needed for endless iterators.
        label_mask: Positions with this label do not count, nor do those that `attention_mask` leaves out. Labels
            are `batch["labels"]`, or the second entry of a tuple where these are integers. Default −100,
            as in PEFT; None: labels do not matter.
        forward_fn: `(peft_model, batch)`, in place of the calls described under `dataloader`.
        adjust_scaling: Whether alpha follows the rank so that all layers keep their scaling: alpha/r, or
            alpha/√r with rsLoRA. Default True.
        eva_state_dict: Components to load, from a report or PEFT's `get_eva_state_dict`, instead of `dataloader`.
            Layers that it does not name keep their start, with a warning.
        progress: Whether to show a bar when it takes more than two seconds.

    Returns:
        What was done: ranks, explained variance, batches, seconds, and the components.

    Raises:
        TypeError: If `peft_model` is not a PEFT model with a LoRA adapter.
        ValueError: If rho < 1 or tau is outside [0, 1]; more than one adapter is active, or one is merged; no
            layer has a LoRA that can be started so, or its start changed the base weight (PiSSA, OLoRA, CorDA,
            LoftQ, LoRA-GA); there are no batches, fewer rows than components, no input for a layer, or values
            that are not finite. The model is then as before.
        MissingDependencyError: If PEFT is not installed.

    Warns:
        UserWarning: If round(ρ·r) is larger than a layer's input, and cut to it.

    Complexity:
        One forward pass over the batches, `2·n·d²` flops for each distinct input with n rows, and an
        eigendecomposition of d × d for it at 4, 8, 16, … batches and at the end.

    References:
        Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv 2410.07170. The paper speaks
        of an SVD of activations; the official code centres them, and so does this by default. The incremental
        SVD of code and PEFT is replaced by exact moments, unless `method` asks for it, and the test of
        convergence by one on subspaces.

    Example:
        ```python
        model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
        report = eva_init_(model, dataloader, rho=2.0, max_batches=32)
        rich.print(report)
        ```
    """
    started = time.perf_counter()
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}; 1 keeps all ranks")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau must be in [0, 1], a cosine, got {tau}; 1 uses all batches")
    adapter, layers = _lora_layers(peft_model)
    batches, converged, explained = 0, False, {}
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("eva_init_ needs batches: give dataloader, or eva_state_dict")
        old = {name: layer.r[adapter] for name, layer in layers.items()}
        dims = {name: _factors(layer, adapter)[0].weight[0].numel() for name, layer in layers.items()}
        pca = ActivationPCA(
            peft_model,
            _wanted(old, dims, rho),
            list(layers),
            method=method,
            center=center,
            progress=progress,
        )

        def deal(components: Components) -> dict[str, int]:
            return _deal(components, old, dims, rho, pca.groups)

        with _base_alone(peft_model):
            batches, converged = pca.fit(
                dataloader,
                forward_fn=forward_fn,
                mask_fn=lambda batch: _mask(batch, label_mask),
                needed=deal,
                tau=tau,
                max_batches=max_batches,
            )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            pca.all_reduce()
        components = pca.components()
        ranks = deal(components)
        eva_state_dict = {
            name: _rows_of_A(components[name], ranks[name], whiten, _factors(layers[name], adapter)[0].weight)
            for name in layers
        }
        explained = {
            name.removeprefix(_PREFIX): float(components[name].ratios[: ranks[name]].sum()) for name in layers
        }
    _check_state(eva_state_dict, layers, adapter)
    before = _parameters(layers.values(), adapter)
    ranks = _load(peft_model, adapter, layers, eva_state_dict, adjust_scaling)
    kept = [layer for (_, layer), rank in zip(layers.items(), ranks.values(), strict=True) if rank]
    return EvaReport(
        ranks=ranks,
        explained=explained,
        parameters=(before, _parameters(kept, adapter)),
        batches=batches,
        converged=converged,
        seconds=time.perf_counter() - started,
        eva_state_dict=dict(eva_state_dict),
    )


def _lora_layers(peft_model: PeftModel) -> tuple[str, dict[str, LoraLayer]]:
    """The active adapter, and the layers whose A multiplies their input, in the order of the model."""
    require("peft", "adapters")
    from peft import PeftModel
    from peft.tuners.lora import LoraConfig, LoraLayer

    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"eva_init_ needs a PeftModel, as get_peft_model(model, LoraConfig(...)) gives, not {type(peft_model).__name__}"
        )
    active = peft_model.active_adapters
    if len(active) != 1:
        raise ValueError(
            f"eva_init_ works on one active adapter, got {active}; choose with set_adapter(name)"
        )
    adapter = active[0]
    config = peft_model.peft_config[adapter]
    if not isinstance(config, LoraConfig):
        raise TypeError(f"adapter {adapter!r} is a {config.peft_type}; eva_init_ starts LoRA adapters")
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} has changed the base weights; make the adapter with True or 'eva'"
        )
    layers: dict[str, LoraLayer] = {}
    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            if module.merged:
                raise ValueError(f"layer {name!r} is merged; call unmerge_adapter() first")
            if adapter in module.lora_A and _can_be_started(module.get_base_layer(), module):
                layers[name] = module
    if not layers:
        raise ValueError(
            f"adapter {adapter!r} has no LoRA on a Linear, Conv1D or Conv2d that eva_init_ could start; "
            "see target_modules"
        )
    return adapter, layers


def _factors(layer: LoraLayer, adapter: str) -> tuple[Any, Any]:
    """The modules A and B, Linear or Conv2d."""
    return layer.lora_A[adapter], layer.lora_B[adapter]


def _can_be_started(base: nn.Module, layer: LoraLayer) -> bool:
    if isinstance(base, nn.Conv2d):
        return base.groups == 1
    # Bare parameters have no input to look at, and MultiheadAttention never calls its projections.
    return type(layer).__name__ != "ParamWrapper" and not isinstance(
        base,
        nn.Embedding | nn.Conv1d | nn.Conv3d | nn.MultiheadAttention | NonDynamicallyQuantizableLinear,
    )


def _wanted(old: Mapping[str, int], dims: Mapping[str, int], rho: float) -> dict[str, int]:
    wanted = {name: round(rho * r) for name, r in old.items()}
    if wide := [name for name, k in wanted.items() if k > dims[name]]:
        warnings.warn(
            f"round(rho * r) is more than the inputs have dimensions in {len(wide)} layers, e.g. "
            f"{wanted[wide[0]]} of {dims[wide[0]]} in {wide[0]!r}; it is cut to these",
            stacklevel=3,
        )
    return {name: min(k, dims[name]) for name, k in wanted.items()}


def _deal(
    components: Components,
    old: Mapping[str, int],
    dims: Mapping[str, int],
    rho: float,
    groups: Mapping[str, tuple[str, ...]],
) -> dict[str, int]:
    """Ranks for components, of each layer at most round(ρ·r)."""
    most = {name: min(dims[name], round(rho * r)) for name, r in old.items()}
    ratios = {name: components[name].ratios[:k].tolist() for name, k in most.items()}
    budget = min(sum(old.values()), sum(most.values()))
    # In the order of groups, so that of layers with equal ratios the one called first is served first.
    ordered = [name for members in groups.values() for name in members]
    dealt = allocate_ranks({name: ratios[name] for name in ordered}, budget)
    return {name: dealt[name] for name in old}


def _rows_of_A(found: Any, rank: int, whiten: bool, weight: Tensor) -> Tensor:
    rows = found.directions[:rank]
    if whiten:
        tiny = torch.finfo(torch.float32).tiny
        rows = rows / found.singular_values[:rank, None].clamp(min=tiny).sqrt()
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return rows.to(dtype).reshape(rank, *weight.shape[1:])


def _mask(batch: Any, label_mask: int | None) -> Tensor | None:
    """Positions of a batch that count; None: all."""
    attention, labels = None, None
    if isinstance(batch, Mapping):
        attention, labels = batch.get("attention_mask"), batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        labels = batch[1]
    mask = attention.bool() if isinstance(attention, Tensor) and attention.ndim == 2 else None
    if label_mask is not None and isinstance(labels, Tensor) and not labels.is_floating_point():
        counted = labels != label_mask
        if mask is None:
            return counted
        counted = counted[:, None] if counted.ndim == 1 else counted
        # Labels of a decoder are no labels of the encoder's positions.
        return mask & counted if counted.shape in (mask.shape, (len(mask), 1)) else mask
    return mask


@contextmanager
def _base_alone(peft_model: PeftModel) -> Iterator[None]:
    """Run the base model alone; afterwards parameters require gradients as before."""
    flags = [(p, p.requires_grad) for p in peft_model.parameters()]
    try:
        with warnings.catch_warnings():
            # That a trained bias stays on is told by PEFT; it is no matter here.
            warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
            with peft_model.disable_adapter():
                yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _check_state(state: Mapping[str, Tensor], layers: Mapping[str, LoraLayer], adapter: str) -> None:
    if unknown := [name for name in state if name not in layers]:
        raise ValueError(
            f"eva_state_dict has {unknown[:3]}, no LoRA layer of this model; layers are named as {next(iter(layers))!r}"
        )
    for name, rows in state.items():
        shape = _factors(layers[name], adapter)[0].weight.shape
        if rows.shape[1:] != shape[1:]:
            raise ValueError(
                f"eva_state_dict has shape {tuple(rows.shape)} for {name!r}, whose A has {tuple(shape)}"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"eva_state_dict has values for {name!r} that are not finite")
    if not any(len(rows) for rows in state.values()):
        raise ValueError("eva_state_dict holds no component for any layer")
    if missing := [name for name in layers if name not in state]:
        warnings.warn(f"eva_state_dict has nothing for {missing}; they keep their start", stacklevel=3)


@torch.no_grad()
def _load(
    peft_model: PeftModel,
    adapter: str,
    layers: Mapping[str, LoraLayer],
    state: Mapping[str, Tensor],
    adjust_scaling: bool,
) -> dict[str, int]:
    """Set A, B, ranks and alphas of the layers, and the configuration."""
    ranks = {}
    removed = []
    for name, layer in layers.items():
        short = name.removeprefix(_PREFIX)
        if name not in state:
            ranks[short] = layer.r[adapter]
            continue
        ranks[short] = len(state[name])
        if len(state[name]) == 0:
            _remove(peft_model, name, layer, adapter)
            removed.append(short)
        else:
            _set(layer, adapter, state[name], adjust_scaling)
    config: Any = peft_model.peft_config[adapter]
    remaining = dict(_remaining(peft_model, adapter))
    if removed:
        config.target_modules = _targets(list(remaining), removed)
    config.rank_pattern = _pattern({name: layer.r[adapter] for name, layer in remaining.items()}, config.r)
    config.alpha_pattern = _pattern(
        {name: layer.lora_alpha[adapter] for name, layer in remaining.items()}, config.lora_alpha
    )
    return ranks


def _set(layer: LoraLayer, adapter: str, rows: Tensor, adjust_scaling: bool) -> None:
    A, B = _factors(layer, adapter)
    rank, old = len(rows), layer.r[adapter]
    base = next(p for p in layer.get_base_layer().parameters())
    device = base.device if A.weight.is_meta else A.weight.device
    shape = (B.weight.shape[0], rank, *B.weight.shape[2:])
    zeros = torch.zeros(shape, dtype=B.weight.dtype, device=device)
    A.weight = nn.Parameter(rows.detach().to(device, A.weight.dtype, copy=True), A.weight.requires_grad)
    B.weight = nn.Parameter(zeros, B.weight.requires_grad)
    if B.bias is not None:
        B.bias = nn.Parameter(torch.zeros_like(B.bias, device=device), B.bias.requires_grad)
    if isinstance(A, nn.Linear):
        A.out_features = B.in_features = rank
    else:
        A.out_channels = B.in_channels = rank
    rooted = layer.use_rslora[adapter]
    if adjust_scaling and rank != old:
        layer.lora_alpha[adapter] *= (rank / old) ** (0.5 if rooted else 1.0)
    layer.r[adapter] = rank
    layer.scaling[adapter] = layer.lora_alpha[adapter] / (rank**0.5 if rooted else rank)


def _remove(peft_model: PeftModel, name: str, layer: LoraLayer, adapter: str) -> None:
    if set(layer.r) == {adapter}:
        parent, _, child = name.rpartition(".")
        setattr(peft_model.get_submodule(parent), child, layer.get_base_layer())
        return
    with warnings.catch_warnings():
        # PEFT then makes another adapter the active one, on this layer alone, and says so.
        warnings.simplefilter("ignore")
        layer.delete_adapter(adapter)
    layer.set_adapter([])


def _remaining(peft_model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    for name, module in peft_model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            yield name.removeprefix(_PREFIX), module


def _targets(kept: list[str], removed: list[str]) -> set[str] | str:
    """Names for `target_modules`, which match ends of names; an expression where one ends like a removed one."""
    if any(name.endswith(f".{end}") for name in removed for end in kept):
        return "|".join(map(re.escape, kept))
    return set(kept)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values of layers that have not the default, by keys that PEFT matches with ends of names."""

    def key(name: str) -> str:
        ambiguous = any(other.endswith(f".{name}") for other in values)
        return f"^{name}" if ambiguous else name

    return {key(name): value for name, value in values.items() if value != default}


def _parameters(layers: Iterable[LoraLayer], adapter: str) -> int:
    factors = [factor for layer in layers for factor in _factors(layer, adapter)]
    return sum(factor.weight.numel() for factor in factors)
