"""The methods that `weightlab adapt` knows: what config each takes, and how it starts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from weightlab._lazy import require
from weightlab.exceptions import UsageError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to adapt a model.

    Attributes:
        summary: What it is, in a few words.
        lr: Learning rate to begin with.
        rank: Rank to begin with; None leaves it to the method's config.
        config: Name of the config in `weightlab.adapters`, or `"LoraConfig"`, which is PEFT's.
        settings: Fields of the config that make the method.
        alpha: Field of the config that scales the update, None if there is none; alpha is the rank unless given.
        variant: Name of the setting that `--variant` chooses, None if there is nothing to choose.
        start: Function in `weightlab.adapters` that starts the adapter once it is there.
        reads_data: Whether that function reads batches.
        callback: Callback in `weightlab.adapters` that training needs.
        changes_base: Whether the start moves part of the base weight into the adapter, which saving must undo.
    """

    summary: str
    lr: float
    rank: int | None = 16
    config: str = "LoraConfig"
    settings: Mapping[str, Any] = field(default_factory=dict)
    alpha: str | None = "lora_alpha"
    variant: str | None = None
    start: str | None = None
    reads_data: bool = False
    callback: str | None = None
    changes_base: bool = False


METHODS: Mapping[str, Method] = {
    "lora": Method(summary="low-rank update from zero", lr=2e-4),
    "rslora": Method(summary="LoRA scaled by the rank's square root", lr=1e-4, settings={"use_rslora": True}),
    "dora": Method(summary="LoRA on directions, magnitudes apart", lr=2e-4, settings={"use_dora": True}),
    "pissa": Method(
        summary="LoRA from the leading singular triples, taken out of the weight",
        lr=5e-5,
        settings={"init_lora_weights": "pissa_niter_16"},
        variant="init_lora_weights",
        changes_base=True,
    ),
    "eva": Method(
        summary="LoRA from principal components of the inputs, ranks dealt by variance",
        lr=5e-4,
        variant="method",
        start="eva_init_",
        reads_data=True,
    ),
    "orthogonal": Method(
        summary="LoRA whose down-projection is frozen to columns of a shared basis",
        lr=1e-3,
        variant="kind",
        start="orthogonal_lora_",
    ),
    "bone": Method(
        summary="one trained block for each block row of the weight",
        lr=1e-4,
        config="BoneConfig",
        alpha=None,
        variant="variant",
    ),
    "sorsa": Method(
        summary="the leading singular triples, kept nearly orthonormal",
        lr=5e-5,
        config="SorsaConfig",
        alpha="alpha",
        variant="reg_mode",
        callback="SorsaCallback",
    ),
    "svfit": Method(
        summary="the leading singular values alone",
        lr=1e-2,
        rank=None,
        config="SvfitConfig",
        alpha=None,
        variant="svd",
    ),
}


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        UsageError: If there is none of that name; the nearest is suggested.

    Example:
        >>> method_named("pissa").changes_base
        True
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else "."
        raise UsageError(f"unknown method {name!r}{hint} There are: {', '.join(METHODS)}")
    return METHODS[name]


def target_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Find the layers that targets name.

    Args:
        model: The base model.
        targets: `("all-linear",)`, all linear layers but the head; or names, or ends of names, of layers.

    Returns:
        Shape of the weight by the layer's full name.

    Raises:
        UsageError: If one of them names no layer; the message lists what there is.

    Example:
        >>> target_shapes(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), ["0"])
        {'0': (3, 4)}
    """
    conv1d = require("transformers.pytorch_utils", "adapters").Conv1D
    linear = {
        name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, conv1d))
    }
    if list(targets) == [ALL_LINEAR]:
        outputs = getattr(model, "get_output_embeddings", lambda: None)()
        found = {name: module for name, module in linear.items() if module is not outputs}
        if not found:
            raise UsageError("the model has no linear layer to adapt; name layers with --targets")
        return {name: _shape(module) for name, module in found.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        matched = {
            name: _shape(module)
            for name, module in model.named_modules()
            if (name == target or name.endswith(f".{target}"))
            and isinstance(module._parameters.get("weight"), nn.Parameter)
        }
        if not matched:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            near = difflib.get_close_matches(target, ends, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(
                f"no layer of the model is called {target}{hint}; its linear layers end in: {', '.join(ends)}"
            )
        shapes |= matched
    return shapes


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(module.get_parameter("weight").shape)


def peft_config(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    targets: Sequence[str],
    rank: int | None = None,
    alpha: float | None = None,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[PeftConfig, dict[str, Any]]:
    """Make a method's config.

    Args:
        name: The method.
        shapes: The layers to adapt, as `target_shapes` finds them.
        targets: The same, as they were named.
        rank: Default: the method's.
        alpha: Default: the rank, so that updates are scaled by 1 (by its root with rsLoRA).
        variant: The method's main choice, e.g. `"affine_row"` for Bone.
        options: Further settings by name, of the config or of the function that starts the adapter.

    Returns:
        The config, and arguments for that function.

    Raises:
        UsageError: If a setting does not exist, is out of range, or the rank is larger than a layer.
    """
    method = method_named(name)
    adapters, peft = require("weightlab.adapters", "adapters"), require("peft", "adapters")
    config_class = peft.LoraConfig if method.config == "LoraConfig" else getattr(adapters, method.config)
    rank = method.rank if rank is None else rank
    if rank is not None:
        _check_rank(rank, shapes)
    of_config = {entry.name for entry in fields(config_class)}
    of_start = _parameters(getattr(adapters, method.start)) if method.start else set()
    chosen = dict(options or {})
    if variant is not None:
        if method.variant is None:
            raise UsageError(f"{name} has no variants; leave --variant out")
        chosen[method.variant] = variant
    for option in chosen:
        if option not in of_config | of_start:
            near = difflib.get_close_matches(option, of_config | of_start, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{name} has no setting {option!r}{hint}")
    arguments: dict[str, Any] = {"task_type": "CAUSAL_LM", **method.settings}
    arguments["target_modules"] = ALL_LINEAR if list(targets) == [ALL_LINEAR] else list(targets)
    if rank is not None:
        arguments["r"] = rank
    if method.alpha is not None:
        arguments[method.alpha] = rank if alpha is None else alpha
    elif alpha is not None:
        raise UsageError(f"{name} has no alpha; leave --alpha out and tune --lr")
    arguments |= {option: value for option, value in chosen.items() if option not in of_start}
    try:
        config = config_class(**arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error
    return config, {option: value for option, value in chosen.items() if option in of_start}


def start_adapter(
    name: str, model: PeftModel, batches: Iterable[Any], arguments: Mapping[str, Any], key: str
) -> None:
    """Give a fresh adapter the start of its method.

    Args:
        name: The method.
        model: The PEFT model.
        batches: What a start from data reads.
        arguments: For the function that does it.
        key: Name by which orthogonal adapters draw their columns, unless a slot or another key is given.

    Raises:
        UsageError: If that function refuses.
    """
    method = method_named(name)
    if method.start is None:
        return
    function = getattr(require("weightlab.adapters", "adapters"), method.start)
    chosen = dict(arguments)
    try:
        if method.reads_data:
            function(model, batches, **{"progress": False, **chosen})
            return
        if not {"slot", "key"} & chosen.keys():
            chosen["key"] = key
        function(model, model.active_adapters[0], **chosen)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error


def _parameters(function: Any) -> set[str]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is keyword
    }


def _check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if rank < 1:
        raise UsageError(f"rank must be at least 1; got {rank}")
    for name, shape in shapes.items():
        if rank > min(shape):
            size = "×".join(map(str, shape))
            raise UsageError(
                f"rank {rank} is larger than {name}, whose weight is {size}; take at most {min(shape)}"
            )
