"""What every adapter of this room has in common: the layer, the model and the config that PEFT expects.

How to write a method on it
---------------------------
A method file brings a config, a layer and a model, names the three in `registration.METHODS`, and ends by calling
`register()`:

    @dataclass
    class SvfitConfig(AdapterConfig):
        method = "svfit"                       # not a field: gives the PEFT type WEIGHTLAB_SVFIT, bias="svfit_only"
        r: int = 8                             # fields of your own; AdapterConfig has the common ones
        def __post_init__(self): super().__post_init__(); check("...", ...)

    class SvfitLayer(LowRankLayer):            # of low_rank.py; or AdapterLayer directly
        prefix = "svfit_"
        roles = Roles(left="frozen", values="trained", right="frozen")
        def initial_factors(self, name, config, r): return Factors(left, values, right)

    class SvfitModel(AdapterModel):
        prefix = "svfit_"
        tuner_layer_cls = SvfitLayer

    register()

`AdapterLayer` asks of a subclass

* class attributes `prefix`, `adapter_layer_names` (attributes that hold trained parameters, each a `ParameterDict` by
  adapter, made in `__init__` before `super().__init__(...)` returns: override `make_containers`) and
  `other_param_names` (all else kept by adapter: `BufferDict(persistent=True)`s of frozen tensors, dicts). Names of
  attributes that are saved must start with `prefix`.
* `reset_adapter(name, config, r, initialize)`: create the adapter's tensors by `self.new_parameter(shape)` and
  `self.new_buffer(shape)` (right dtype and device, zeros) and fill them if `initialize`. It is False while loading:
  values follow from the file, parameters may be on meta. `self.base_matrix()` is the frozen weight, (out, in),
  float32 or float64, dequantised, never merged, not to be written to; `self.start_matrix()` also refuses NaN;
  `self.shape` is (out, in).
* `delta_weight(name)`: ΔW, (out, in), in the adapter's dtype, including the scale.
* optionally `adapt(name, x, result)`: `result` plus the adapter's share of the output, for an `x` after dropout
  (default: by `delta_weight`). Dtypes: see `compute_dtype`.
* optionally `prepare(names)`, called before every forward with the adapters that it will use; and
  `place_base(names)`, called then and before merging (with none), to put another weight into the base by `hold`.
* optionally, for an update that depends on the weight: `is_additive(name)` False, and `effective_weight(name, weight)`
  the new matrix from one of shape (out, in) that earlier active adapters may have changed. Default:
  `weight + delta_weight(name)`. `adapted(names, x, ...)` then computes the layer from that weight; override it where a
  faster form exists.
* optionally `lora_factors(name)`: (A, B) with ΔW = B A, for `to_lora`; and `supports_lora_conversion(name)`.

It brings several active adapters, dropout, disabling, merging (bit-exact unmerging, from the weight kept while the
model is merged), layouts (`self.layout`, see layouts.py), half-precision and quantised bases.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightlab.adapters._peft import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    BaseTuner,
    BaseTunerLayer,
    BufferDict,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftType,
    check_adapters_to_merge,
    get_pattern_key,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from weightlab.adapters.layouts import layout_of


@dataclass
class AdapterConfig(PeftConfig):
    """Fields that all methods share.

    Attributes:
        r: Rank, at least 1.
        target_modules: Names, or ends of names, of the layers to adapt; one string is a regular expression over whole
            names, `"all-linear"` means all linear layers but the head. Default: those that PEFT adapts by LoRA in the
            architecture.
        exclude_modules: Names not to adapt, in the same form.
        dropout: Probability with which an adapter's inputs are zeroed in training; the base layer's stay. Embeddings'
            inputs cannot be dropped.
        bias: Which biases train too: `"none"`, `"all"`, or `"<method>_only"`, those of the adapted layers.
        modules_to_save: Modules trained whole and saved with the adapter, such as a new head.
        layers_to_transform: Indices of the blocks to adapt. Default: all.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` is given and the name is uncommon.
        rank_pattern: Ranks of layers that differ from `r`, by (end of) name or regular expression.
        init_weights: Whether to compute the start from the base weight. `save_pretrained` writes False into the
            file, since a saved adapter carries its values, and loading need not compute them first.

    Raises:
        ValueError: If a field is out of range.
    """

    method: ClassVar[str]

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    dropout: float = 0.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.type_name()]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        for name, r in {
            "r": self.r,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }.items():
            check(f"{name}={r!r}", is_rank(r), "an integer of at least 1")
        check(f"dropout={self.dropout!r}", 0 <= self.dropout < 1, "in [0, 1)")
        biases = ("none", "all", f"{self.method}_only")
        check(f"bias={self.bias!r}", self.bias in biases, f"one of {', '.join(biases)}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                check(
                    f"{name}={getattr(self, name)!r}",
                    getattr(self, name) is None,
                    "left out if target_modules is a regular expression: name the blocks in that",
                )

    @classmethod
    def type_name(cls) -> str:
        """Name of the method among PEFT's types."""
        return f"WEIGHTLAB_{cls.method.upper()}"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, for an adapter whose values are saved beside it."""
        init_weights, self.init_weights = self.init_weights, False
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.init_weights = init_weights


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A base layer and its adapters. See the module's docstring for what a method adds.

    Args:
        base_layer: The layer to adapt.
        adapter_name: Name of the first adapter.
        config: Its config.
        r: Its rank in this layer.
        key: The layer's name in the model, for messages.
        quantization: What PEFT's quantisation backends ask for.

    Attributes:
        layout: How the base holds its weight.
        shape: (out, in) of the weight as a matrix.
        ranks: Rank by adapter.
    """

    prefix: ClassVar[str]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AdapterConfig,
        *,
        r: int,
        key: str = "",
        **quantization: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        backend = self.quantization_backend
        try:
            self.layout = layout_of(base, quantized=backend is not None and backend.layer_type == "linear")
        except (TypeError, ValueError) as error:
            raise type(error)(f"target module {key!r} {error}") from None
        self.shape = self.layout.shape
        self.ranks: dict[str, int] = {}
        self.dropouts = nn.ModuleDict()
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._original: Tensor | None = None
        self.make_containers()
        self.update_layer(adapter_name, config, r=r, inference_mode=config.inference_mode)

    def make_containers(self) -> None:
        """Create the attributes named in `adapter_layer_names` and `other_param_names`, empty."""
        raise NotImplementedError

    def reset_adapter(self, name: str, config: AdapterConfig, r: int, initialize: bool) -> None:
        """Create an adapter's tensors, and fill them if `initialize`."""
        raise NotImplementedError

    def delta_weight(self, name: str) -> Tensor:
        """Return what the adapter adds to the weight, (out, in)."""
        raise NotImplementedError

    def adapt(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """Add an adapter's share to the output.

        Args:
            name: The adapter.
            x: The layer's input, after dropout.
            result: The output so far.

        Returns:
            The output, in any floating dtype.
        """
        dtype = self.compute_dtype(x, self.adapter_dtype)
        delta = self.delta_weight(name).to(dtype)
        return result + self.layout.apply(self.get_base_layer(), self._input(x, dtype), delta)

    def is_additive(self, name: str) -> bool:
        """Whether `delta_weight` does not depend on the weight, so that adapters add up."""
        return True

    def effective_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return the matrix (out, in) that the adapter makes of one of that shape."""
        return weight + self.delta_weight(name).to(weight.dtype)

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A (k, in) and B (out, k) with `delta_weight` = B A."""
        raise TypeError(
            f"{type(self).__name__} {self.key!r}: the update is not of low rank, and no LoRA equals it"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may approximate the adapter."""
        return self.is_additive(adapter_name)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return `delta_weight` in the layout of the base's weight, as PEFT's tools expect."""
        return self.layout.weight(self.delta_weight(adapter_name))

    def update_layer(
        self, adapter_name: str, config: AdapterConfig, *, r: int, inference_mode: bool = False
    ) -> None:
        """Add an adapter to the layer."""
        weight = self.get_base_layer().weight
        initialize = (
            config.init_weights and not _on_meta() and not (isinstance(weight, Tensor) and weight.is_meta)
        )
        self.ranks[adapter_name] = r
        self.dropouts[adapter_name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        with torch.no_grad():
            self.reset_adapter(adapter_name, config, r, initialize)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def adapter_dtype(self) -> torch.dtype:
        """Dtype that new adapters get: float32, or the base's float64."""
        weight = self.get_base_layer().weight
        return (
            torch.float64 if isinstance(weight, Tensor) and weight.dtype == torch.float64 else torch.float32
        )

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Create a trainable tensor of zeros."""
        return nn.Parameter(self.new_buffer(*shape))

    def new_buffer(self, *shape: int) -> Tensor:
        """Create a tensor of zeros on the base's device; never on meta, where PEFT would leave it."""
        device = next(iter(self.get_base_layer().parameters())).device
        return torch.zeros(shape, dtype=self.adapter_dtype, device="cpu" if device.type == "meta" else device)

    def base_matrix(self) -> Tensor:
        """Return the frozen weight as a matrix (out, in), without what is merged into it.

        Raises:
            TypeError: If it is quantised in a way that PEFT cannot undo.
        """
        return self.layout.matrix(self._base_weight().detach()).to(self.adapter_dtype)

    def start_matrix(self) -> Tensor:
        """Return `base_matrix` to start an adapter from.

        Raises:
            ValueError: If it is not finite.
        """
        matrix = self.base_matrix()
        if not matrix.isfinite().all():
            raise ValueError(
                f"the weight of {self.key!r} holds NaN or infinity; adapters cannot start from it"
            )
        return matrix

    def _base_weight(self) -> Tensor:
        if self._original is not None:
            return self._original
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"the weight of {self.key!r} is quantised by {backend.backend_name}, which cannot be undone, and this "
                "method needs it; use bitsandbytes, HQQ or torchao, or do not quantise this layer"
            )
        return self.get_base_weight()

    def hold(self, matrix: Tensor) -> None:
        """Let the base layer hold another matrix, and keep its own weight aside."""
        original = self._base_weight()
        self.set_base_weight(self.layout.weight(matrix).to(original.device, original.dtype))
        self._original = original

    def restore(self) -> None:
        """Give the base layer its own weight back, bit for bit."""
        if self._original is not None:
            weight = self.get_base_weight()
            self.set_base_weight(self._original.to(weight.device, weight.dtype))
            self._original = None

    def has_adapter(self, name: str) -> bool:
        """Whether this layer has an adapter of that name."""
        return name in self.ranks

    def compute_dtype(self, x: Tensor, dtype: torch.dtype) -> torch.dtype:
        """Dtype to compute an adapter's share in: autocast's if it is on, else that of the adapter."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return dtype

    @staticmethod
    def _input(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer with its active adapters. Input, output and their dtype are the base layer's."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            names = []
        else:
            names = [name for name in self.active_adapters if self.has_adapter(name)]
        self.prepare(names)
        self.place_base(names)
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(names, x, *args, **kwargs)

    def prepare(self, names: Sequence[str]) -> None:
        """Called before every forward with the adapters it will use."""

    def place_base(self, names: Sequence[str]) -> None:
        """Let the base layer hold what it should while these adapters are used."""

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer with some adapters, in order."""
        base = self.get_base_layer()
        if all(self.is_additive(name) for name in names):
            result = self.base_layer(x, *args, **kwargs)
            dtype = result.dtype
            for name in names:
                result = self.adapt(name, self.dropouts[name](x) if x.is_floating_point() else x, result)
            return result.to(dtype)
        matrix = self.base_matrix()
        for name in names:
            matrix = self.effective_weight(name, matrix)
        dtype = self.compute_dtype(x, self.get_base_weight().dtype)
        bias = getattr(base, "bias", None)
        return self.layout.apply(
            base, self._input(x, dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight.

        The base's own weight is kept until `unmerge` or unloading, so that nothing is lost to rounding.

        Args:
            safe_merge: Refuse, and change nothing, if the merged weight is not finite.
            adapter_names: Default: the active ones.

        Raises:
            ValueError: If `safe_merge` finds NaN or infinity.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        self.place_base([])
        with torch.no_grad():
            matrix = self.base_matrix()
            for name in [*self.merged_adapters, *names]:
                matrix = self.effective_weight(name, matrix)
                if safe_merge and not matrix.isfinite().all():
                    raise ValueError(
                        f"adapter {name!r} would put NaN or infinity into {self.key!r}; it was not merged"
                    )
            self.hold(matrix)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all adapters out of the base weight again, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.restore()
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off."""
        super().enable_adapters(enabled)
        if not enabled and not self.merged:
            self.place_base([])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        super().delete_adapter(adapter_name)
        self.ranks.pop(adapter_name, None)
        if adapter_name in self.dropouts:
            del self.dropouts[adapter_name]
        if not self.merged:
            self.place_base([])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the base layer back, with or without the adapters in it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            self.restore()
        return self.get_base_layer()

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter's tensors; their dtype stays, whatever the base's."""
        target = device or next(iter(self.get_base_layer().parameters())).device
        if target.type == "meta":
            return
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name)
            if isinstance(container, (nn.ParameterDict, BufferDict)) and adapter_name in container:
                tensor = container[adapter_name]
                if tensor is not None and not tensor.is_meta:
                    container[adapter_name] = tensor.to(target)

    def extra_repr(self) -> str:
        """Show the ranks."""
        return f"ranks={self.ranks}"


class AdapterModel(BaseTuner):
    """A model with adapters of one method in it; PEFT's `get_peft_model` makes one."""

    prefix: str
    tuner_layer_cls: type[AdapterLayer]  # type: ignore[assignment]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def to_lora(
        self, adapter_name: str | None = None, path: str | Path | None = None
    ) -> tuple[LoraConfig, dict[str, Tensor]]:
        """Turn an adapter into a plain LoRA that does the same; see `lora_export.to_lora`."""
        from weightlab.adapters.lora_export import to_lora

        return to_lora(self, adapter_name or self.active_adapters[0], path)

    def rank(self, config: AdapterConfig, key: str, layer: nn.Module) -> int:
        """Return the rank that an adapter gets in the layer called `key`."""
        return config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = self.rank(peft_config, current_key, target)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, r=r, inference_mode=peft_config.inference_mode)
            return
        quantization = get_quantization_kwargs(self)
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, r=r, key=current_key, **quantization)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model, as a whole or not at all."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception as error:
            self._take_back(model, adapter_name)
            if isinstance(error, NoMatchingPeftModuleError):
                raise ValueError(f"{error} {_candidates(model, self.peft_config[adapter_name])}") from None
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        if (
            peft_config.target_modules is None
            and model_config.get("model_type") not in self.target_module_mapping
        ):
            raise ValueError(
                f"target_modules must be given for models of type {model_config.get('model_type')!r}. "
                f"{_candidates(self.model, peft_config)}"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _take_back(self, model: nn.Module, adapter_name: str) -> None:
        for key, layer in list(model.named_modules()):
            if not isinstance(layer, self.tuner_layer_cls) or not layer.has_adapter(adapter_name):
                continue
            if set(layer.ranks) == {adapter_name}:
                parent, _, child = key.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
            else:
                active = [name for name in layer.active_adapters if name != adapter_name]
                layer._active_adapter = active
                layer.delete_adapter(adapter_name)


def _candidates(model: nn.Module, config: Any) -> str:
    """Say which layers could be adapted, those first whose names are like the ones asked for."""
    ends = dict.fromkeys(
        key.rpartition(".")[2] for key, module in model.named_modules() if key and _is_supported(module)
    )
    names = [name for name in ends if not re.fullmatch(r"\d+", name)] or list(ends)
    asked = config.target_modules if isinstance(config.target_modules, set) else []
    close = [name for end in sorted(asked) for name in get_close_matches(end, names)]
    listed = list(dict.fromkeys([*close, *names]))
    return f"Layers that can be adapted end in: {', '.join(listed[:20])}{', …' if len(listed) > 20 else ''}."


def _is_supported(module: nn.Module) -> bool:
    try:
        layout_of(module)
    except (TypeError, ValueError):
        return False
    return True


def _on_meta() -> bool:
    """Whether PEFT is creating parameters on meta, to be filled from a file."""
    return nn.ParameterDict({"probe": nn.Parameter(torch.zeros(()))})["probe"].is_meta


def is_rank(value: object) -> bool:
    """Whether a value can be a rank: an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check(what: str, holds: bool, wanted: str) -> None:
    """Raise a ValueError that says what was given and what is wanted, unless it holds.

    Example:
        >>> check("dropout=2", False, "in [0, 1)")
        Traceback (most recent call last):
        ValueError: dropout=2 must be in [0, 1)
    """
    if not holds:
        raise ValueError(f"{what} must be {wanted}")
