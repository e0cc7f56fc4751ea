"""Adding adapters up, exactly: into the weights, or side by side as one LoRA of the summed rank."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightlab.adapters._peft import LoraConfig, PeftModel
from weightlab.adapters.lora_layers import (
    PEFT_PREFIX,
    LoraLayer,
    check_additive,
    factors,
    holds,
    lora_layers,
    matrices,
)
from weightlab.adapters.orthogonal import OrthogonalMetadata, orthogonal_metadata

Method = Literal["weights", "cat"]

_DISJOINT = 1e-3


@dataclass
class Merge:
    """What `merge_adapters` did.

    Attributes:
        weights: The factor of each adapter.
        method: `"weights"` or `"cat"`.
        layers: How many layers changed.
        rank: The largest sum of ranks in a layer.
    """

    weights: dict[str, float]
    method: Method
    layers: int
    rank: int
    _kept: list[tuple[LoraLayer, Tensor, dict[str, float]]] = field(default_factory=list, repr=False)

    def unmerge(self) -> None:
        """Put the weights back as they were, bit by bit, and the adapters to work again.

        Raises:
            ValueError: If nothing is kept: after `"cat"` (delete the new adapter instead), with
                `keep=False`, or if it was called before.
        """
        if not self._kept:
            raise ValueError(
                "there is nothing to put back: unmerge works once, after method='weights' and keep=True"
            )
        for layer, weight, scaling in self._kept:
            layer.get_base_layer().weight.data.copy_(weight)  # type: ignore[union-attr, operator]
            layer.scaling.update(scaling)
            layer.merged_adapters.clear()
        self._kept.clear()


@torch.no_grad()
def merge_adapters(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    method: Method = "weights",
    adapter_name: str = "merged",
    keep: bool = True,
) -> Merge:
    """Add several LoRAs up: ``W + Σ λᵢ·scalingᵢ·BᵢAᵢ``, without data and without approximation.

    Scaling is each adapter's own, alpha/r or with rsLoRA alpha/√r. The λ need not sum to one: averaging dilutes
    every adapter. The paper takes 0.6 for each.

    - ``"weights"`` adds the sum, formed in float32 and rounded once, to the base weights. The model then runs
      at the base's speed, PEFT's `unload` makes it a plain one, and ``unmerge()`` of the result restores it.
    - ``"cat"`` makes a new LoRA of PEFT's whose rank is the sum of the ranks, and leaves the others alone. It
      has ``lora_A = [A₁; A₂; …]``, ``lora_B = [λ₁s₁B₁, λ₂s₂B₂, …]`` and scaling 1, and works over quantised
      bases. Activate it by ``set_adapter``.

    PEFT's `add_weighted_adapter` does neither by default: its ``"linear"`` adds the A's and the B's up
    separately, which brings in the cross terms BᵢAⱼ, and its ``"cat"`` misses the scaling with rsLoRA.

    Warns, with the measured overlap, where one of the adapters is by `orthogonal_lora_` and two of them share
    input directions: other seeds, other ranks, keys that drew the same columns, or a plain LoRA among them.

    Args:
        model: A PEFT model; for ``"weights"`` also its tuner or a model with injected adapters.
        weights: Factor λ by adapter name.
        method: As above.
        adapter_name: Name of the new adapter of ``"cat"``.
        keep: Whether to keep the weights for `Merge.unmerge`, one copy of each layer that changes.

    Returns:
        A `Merge`.

    Raises:
        ValueError: For an unknown method; if there is no LoRA to merge, or one is unknown, is not additive
            (DoRA, variants, trained biases), brings `modules_to_save`, is merged already, or adapts a grouped
            convolution; for ``"weights"`` over a quantised base or a tied weight; for ``"cat"`` if the name is
            taken. Nothing is changed then.
        TypeError: For ``"cat"``, if `model` is not a `PeftModel`.

    Complexity:
        ``"weights"``: ``2·m·n·Σr`` flops a layer. ``"cat"``: a copy of the factors.

    Reference:
        Po et al., "Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv 2312.02432.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config, "cat")
        >>> model.add_adapter("dog", config)
        >>> merge_adapters(model, {"cat": 0.6, "dog": 0.6}, method="cat")
        Merge(weights={'cat': 0.6, 'dog': 0.6}, method='cat', layers=1, rank=4)
    """
    if method not in ("weights", "cat"):
        raise ValueError(f"method must be 'weights' or 'cat', got {method!r}")
    chosen = {name: float(weight) for name, weight in weights.items()}
    layers = _layers(model, chosen)
    if method == "cat":
        _check_cat(model, adapter_name)
    _warn_of_overlap(model, layers, list(chosen))
    ranks = {
        key: sum(len(factors(layer, name)[0]) for name in chosen if holds(layer, name))
        for key, layer in layers.items()
    }
    merge = Merge(chosen, method, len(layers), max(ranks.values()))
    if method == "cat":
        assert isinstance(model, PeftModel)
        _concatenate(model, layers, ranks, chosen, adapter_name)
        return merge
    bases = {key: _base_weight(model, key, layer) for key, layer in layers.items()}
    for key, layer in layers.items():
        present = {name: weight for name, weight in chosen.items() if holds(layer, name)}
        base = bases[key]
        if keep:
            merge._kept.append((layer, base.clone(), {name: layer.scaling[name] for name in present}))
        base.copy_(base.to(_wide(base)) + delta(layer, present))
        for name, weight in present.items():
            # PEFT's own unmerging then takes out what was put in.
            layer.scaling[name] *= weight
            layer.merged_adapters.append(name)
    return merge


def delta(layer: LoraLayer, weights: Mapping[str, float]) -> Tensor:
    """Return ``Σ λᵢ·scalingᵢ·BᵢAᵢ`` in the shape and on the device of the base weight, at least float32."""
    parts = {name: matrices(layer, name) for name in weights}
    A = torch.cat([A for A, _ in parts.values()])
    B = torch.cat([B * (weights[name] * layer.scaling[name]) for name, (_, B) in parts.items()], 1)
    base: Any = layer.get_base_layer()
    total = B @ A
    transposed = getattr(layer, "fan_in_fan_out", False) or isinstance(base, nn.Embedding)
    return (total.mT if transposed else total).reshape(base.weight.shape).to(base.weight.device)


def overlap(first: Tensor, second: Tensor) -> float:
    """Return ``‖BᵢᵀBⱼ‖_F`` of two down-projections `(r, n)`, whose rows are scaled to norm 1 first.

    It is √r for equal orthonormal rows, √c where c are shared, 0 for disjoint ones.

    Example:
        >>> round(overlap(torch.eye(4)[:3], 2 * torch.eye(4)[1:]), 6) == round(2**0.5, 6)
        True
    """
    first, second = (nn.functional.normalize(rows, dim=1) for rows in (first, second))
    return float((first @ second.mT).norm())


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _layers(model: nn.Module, chosen: Mapping[str, float]) -> dict[str, LoraLayer]:
    if not chosen:
        raise ValueError("there is nothing to merge: weights is empty; give e.g. {'cat': 0.6, 'dog': 0.6}")
    layers: dict[str, LoraLayer] = {}
    for name in chosen:
        own = lora_layers(model, name)
        for key, layer in own.items():
            check_additive(key, layer, name)
            if layer.merged_adapters:
                raise ValueError(
                    f"{key} holds {layer.merged_adapters} in its weight already; unmerge them first"
                )
            if getattr(layer.get_base_layer(), "groups", 1) != 1:
                raise ValueError(f"{key} is a grouped convolution, which is not supported; leave it out")
        config: Any = getattr(model, "peft_config", {}).get(name)
        if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"adapter {name!r} brings whole modules or biases (modules_to_save={config.modules_to_save}, "
                f"bias={config.bias!r}), of which there is no sum; train it without"
            )
        layers |= own
    return layers


def _base_weight(model: nn.Module, key: str, layer: LoraLayer) -> Tensor:
    base: Any = layer.get_base_layer()
    if not base.weight.is_floating_point() or getattr(layer, "quantization_backend", None) is not None:
        raise ValueError(
            f"the weight of {key} is quantised ({base.weight.dtype}): it cannot take the sum exactly; use method='cat'"
        )
    if tied := tied_to(model, base):
        raise ValueError(
            f"{key} shares its weight with {tied}, which the adapter leaves alone and a merge would change; use "
            f"method='cat'"
        )
    return base.weight.data


def tied_to(model: nn.Module, layer: nn.Module) -> str | None:
    """Return the name of another module of the model that has the layer's weight, None if there is none."""
    for name, module in model.named_modules():
        if module is not layer and module._parameters.get("weight") is layer.weight:
            return name.removeprefix(PEFT_PREFIX)
    return None


def _check_cat(model: nn.Module, adapter_name: str) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(f"method='cat' adds an adapter to a PeftModel, and model is a {type(model).__name__}")
    if adapter_name in model.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")


def _concatenate(
    model: PeftModel,
    layers: Mapping[str, LoraLayer],
    ranks: Mapping[str, int],
    chosen: Mapping[str, float],
    adapter_name: str,
) -> None:
    first: Any = model.peft_config[next(iter(chosen))]
    every = [name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()]
    model.add_adapter(adapter_name, concatenated_config(first, ranks, every))
    for layer in layers.values():
        present = [name for name in chosen if holds(layer, name)]
        parts = [factors(layer, name) for name in present]
        A, B = factors(layer, adapter_name)
        A.copy_(torch.cat([part.to(A) for part, _ in parts]))
        scales = [chosen[name] * layer.scaling[name] for name in present]
        B.copy_(torch.cat([part.to(B) * scale for (_, part), scale in zip(parts, scales, strict=True)], 1))


def concatenated_config(
    first: Any, ranks: Mapping[str, int], every: Iterable[str], targets: Iterable[str] | None = None
) -> LoraConfig:
    """Return a config for a LoRA of scaling 1 that has these ranks on these layers and nothing elsewhere.

    What concerns the base model is taken from `first`; what concerns training is PEFT's default.

    Args:
        first: Config of an adapter of the same base model.
        ranks: Rank by layer.
        every: Names of all modules. PEFT takes a name for all whose own ends in it, unless told otherwise.
        targets: Names or ends of names that select the layers. Default: their names.
    """
    ambiguous = any(name.endswith(f".{key}") for name in every for key in ranks)
    rank = max(ranks.values())
    pattern = {f"^{re.escape(key)}$" if ambiguous else key: r for key, r in ranks.items() if r != rank}
    names = "|".join(map(re.escape, ranks)) if ambiguous else list(ranks)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=names if targets is None else sorted(targets),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        inference_mode=True,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        task_type=first.task_type,
        fan_in_fan_out=first.fan_in_fan_out,
    )


def _warn_of_overlap(model: nn.Module, layers: Mapping[str, LoraLayer], names: list[str]) -> None:
    downs = {
        name: {key: matrices(layer, name)[0] for key, layer in layers.items() if holds(layer, name)}
        for name in names
    }
    for message in shared_directions(downs, {name: orthogonal_metadata(model, name) for name in names}):
        warnings.warn(message, stacklevel=4)


def shared_directions(
    downs: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, OrthogonalMetadata | None]
) -> list[str]:
    """Say which adapters share input directions though one of them is orthogonal.

    Args:
        downs: Down-projections `(r, n)` by adapter and layer.
        known: What is known of each adapter.

    Returns:
        A sentence for each such pair, with the largest overlap measured.
    """
    messages = []
    for a, b in combinations(downs, 2):
        if known[a] is None and known[b] is None:
            continue
        measured = {key: overlap(downs[a][key], downs[b][key]) for key in downs[a].keys() & downs[b].keys()}
        if not measured or max(measured.values()) <= _DISJOINT:
            continue
        worst = max(sorted(measured), key=lambda key: measured[key])
        r = min(len(downs[name][worst]) for name in (a, b))
        messages.append(
            f"adapters {a!r} ({known[a] or 'not orthogonal'}) and {b!r} ({known[b] or 'not orthogonal'}) share input "
            f"directions: ‖B_aᵀB_b‖ is up to {measured[worst]:.3g} ({worst}), where {r**0.5:.3g} would be the same "
            f"{r} columns; give both one basis_seed, one rank and different slots"
        )
    return messages
