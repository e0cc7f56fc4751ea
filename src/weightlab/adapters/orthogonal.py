"""Orthogonal Adaptation: LoRA whose down-projection is frozen to a few columns of a shared basis."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.adapters.basis import Kind, shared_basis
from weightlab.adapters.lora_layers import LoraLayer, check_additive, factors, lora_layers

# The one free string of a LoraConfig that survives saving and loading and that PEFT reads only beside
# `megatron_config`. An entry of our own would make stock PEFT warn about a file from the future.
_FIELD, _DEFAULT = "megatron_core", "megatron.core"
_MARK = f"{_DEFAULT} # weightlab.orthogonal_lora "


@dataclass(frozen=True)
class OrthogonalMetadata:
    """Where an adapter's frozen down-projection comes from; kept in the adapter's config.

    Attributes:
        basis_seed: Seed of the basis.
        kind: `"orthogonal"`, `"hadamard"`, `"gaussian"`, or `"given"` for a basis of the caller's.
        slot: Slot, if it has one.
        key: Key, if it has one.
        scale: Factor on the columns.
        checksum: Of all of lora_A, as float32.
    """

    basis_seed: int
    kind: str
    slot: int | None
    key: str | None
    scale: float
    checksum: str

    def __str__(self) -> str:
        where = f"slot {self.slot}" if self.key is None else f"key {self.key!r}"
        return f"{where}, basis_seed {self.basis_seed}, kind {self.kind}, scale {self.scale:g}"


def orthogonal_lora_(
    peft_model: nn.Module,
    adapter_name: str = "default",
    *,
    slot: int | None = None,
    key: str | None = None,
    basis_seed: int = 0,
    kind: Kind = "orthogonal",
    scale: float = 1.0,
    basis: Mapping[str, Tensor] | None = None,
    slots: int | None = None,
    unfold_convolutions: bool = False,
) -> OrthogonalMetadata:
    """Turn a fresh LoRA of PEFT's into an orthogonal adapter, in place.

    Every lora_A becomes r columns of the basis that all share for its width, transposed, and is frozen; lora_B
    becomes zero and is all that trains. Adapters with one `basis_seed` and different slots then listen to
    disjoint directions of every layer's input: ``ΔWᵢΔWⱼᵀ = 0`` whatever they learn, and they can be added by
    `merge_adapters`. That is all that is guaranteed. ``ΔWⱼ`` does not vanish on the inputs of adapter i, of
    which about r/n of the energy lies in j's columns; `crosstalk` measures how much comes through.

    The result is an ordinary LoRA: saved, loaded and merged by any program that knows LoRA. In PEFT 0.21 and
    later lora_A stays frozen whatever is activated or trained; with an earlier PEFT this warns, since
    `set_adapter` thaws it. Loading does not remember what was frozen: to train a loaded adapter further, call
    `freeze_basis_`. Loading a checkpoint into a model that `orthogonal_lora_` was called on needs nothing.

    Args:
        peft_model: A PEFT model, its tuner, or a model with an injected adapter.
        adapter_name: The LoRA, new: its lora_B is zero.
        slot: Number of the adapter; exact, for those who can hand out numbers.
        key: Name of the adapter: columns are drawn from a hash of it and of the layer's name and width, and
            may be shared with others. Give either this or `slot`.
        basis_seed: Which of the bases. All who want to merge use one.
        kind: Family of bases; see `shared_basis`.
        scale: Factor on the columns. Default 1: the paper's columns have norm 1. It acts as a factor on the
            learning rate.
        basis: For each layer, by its name in the base model, directions `(m, n)` to deal to the slots instead
            of a generated basis, such as ``{name: c.directions for name, c in pca.components().items()}`` of
            an `ActivationPCA` with all components. Ours, not the paper's.
        slots: With `basis`: how many slots the directions are dealt to. Default: as many as there is room for.
        unfold_convolutions: Take a convolution's input to be the patches under its kernel, of width
            ``in·height·width``; else only 1×1 kernels are accepted.

    Returns:
        What was written into the adapter's config.

    Raises:
        ValueError: If there is no such LoRA; if it was trained already (an existing LoRA cannot be converted);
            if its rank exceeds a width or the slot does not exist there; for DoRA and other variants,
            embeddings, kernels, and layers that `basis` lacks. Nothing is changed then.

    Complexity:
        That of `shared_basis`, once a width and seed.

    Reference:
        Po et al., "Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv 2312.02432.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> print(orthogonal_lora_(model, slot=3))
        slot 3, basis_seed 0, kind orthogonal, scale 1
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['base_model.model.0.lora_B.default.weight']
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    layers = lora_layers(peft_model, adapter_name)
    rows: dict[str, Tensor] = {}
    for name, layer in layers.items():
        A, B = _checked(name, layer, adapter_name, unfold_convolutions)
        if basis is not None and name not in basis:
            raise ValueError(f"basis has no directions for layer {name}; it has {', '.join(basis) or 'none'}")
        try:
            columns = shared_basis(
                A[0].numel(),
                len(A),
                slot=slot,
                key=key,
                seed=basis_seed,
                kind=kind,
                layer=name,
                basis=None if basis is None else basis[name],
                slots=slots,
                dtype=torch.float64,
            )
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        rows[name] = columns.mT.mul(scale).reshape(A.shape)
    for name, layer in layers.items():
        A, B = factors(layer, adapter_name)
        with torch.no_grad():
            A.copy_(rows[name])
            B.zero_()
    _freeze(layers.values(), adapter_name)
    metadata = OrthogonalMetadata(
        basis_seed,
        kind if basis is None else "given",
        slot,
        key,
        float(scale),
        _checksum(layers, adapter_name),
    )
    config = _config(peft_model, adapter_name)
    if config is not None:
        # Adapters may have been added with one and the same config.
        config = copy.copy(config)
        setattr(config, _FIELD, _MARK + json.dumps(asdict(metadata)))
        peft_model.peft_config[adapter_name] = config  # type: ignore[index, operator]
    return metadata


def orthogonal_metadata(model: nn.Module, adapter_name: str = "default") -> OrthogonalMetadata | None:
    """Return what `orthogonal_lora_` wrote into an adapter's config, also after loading; None for other adapters.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> print(orthogonal_metadata(model))
        None
    """
    return parse_metadata(getattr(_config(model, adapter_name), _FIELD, None))


def parse_metadata(text: str | None) -> OrthogonalMetadata | None:
    """Read the field of an adapter's config that `orthogonal_lora_` writes."""
    if not isinstance(text, str) or not text.startswith(_MARK):
        return None
    return OrthogonalMetadata(**json.loads(text.removeprefix(_MARK)))


def freeze_basis_(peft_model: nn.Module, adapter_name: str = "default") -> OrthogonalMetadata:
    """Freeze the down-projection of an orthogonal adapter again after it was loaded, to train it further.

    Args:
        peft_model: The model, e.g. of `PeftModel.from_pretrained(..., is_trainable=True)`.
        adapter_name: The adapter.

    Returns:
        What its config says about it.

    Raises:
        ValueError: If the adapter is not one by `orthogonal_lora_`, or its lora_A is no longer what it was.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
        >>> _ = orthogonal_lora_(model, key="cat")
        >>> print(freeze_basis_(model))
        key 'cat', basis_seed 0, kind orthogonal, scale 1
    """
    layers = lora_layers(peft_model, adapter_name)
    metadata = orthogonal_metadata(peft_model, adapter_name)
    if metadata is None:
        raise ValueError(f"adapter {adapter_name!r} was not made by orthogonal_lora_")
    if _checksum(layers, adapter_name) != metadata.checksum:
        raise ValueError(
            f"lora_A of adapter {adapter_name!r} is not what orthogonal_lora_ made it ({metadata}): it was trained, or "
            f"rounded to another dtype"
        )
    _freeze(layers.values(), adapter_name)
    return metadata


def _config(model: nn.Module, adapter_name: str) -> Any:
    return getattr(model, "peft_config", {}).get(adapter_name)


def _checked(name: str, layer: LoraLayer, adapter_name: str, unfold: bool) -> tuple[Tensor, Tensor]:
    check_additive(name, layer, adapter_name)
    if adapter_name in layer.lora_embedding_A:
        raise ValueError(
            f"{name} is an embedding: its inputs are single tokens, to which directions of a shared basis mean "
            f"nothing; leave it out of target_modules"
        )
    A, B = factors(layer, adapter_name)
    if A.is_meta or B.is_meta:
        raise ValueError(f"the LoRA of {name} is on the meta device; load it first")
    if A.ndim > 2 and A[0, 0].numel() > 1 and not unfold:
        raise ValueError(
            f"{name} is a convolution with a {'×'.join(map(str, A.shape[2:]))} kernel, for which the paper says nothing; "
            f"leave it out of target_modules, or take patches for inputs by unfold_convolutions=True"
        )
    if bool(B.count_nonzero()):
        raise ValueError(
            f"lora_B of {name} is not zero: adapter {adapter_name!r} was trained already or starts from the weights, "
            f"and cannot be converted; begin with a new LoRA"
        )
    return A, B


def _freeze(layers: Iterable[LoraLayer], adapter_name: str) -> None:
    forgetful = False
    for layer in layers:
        factors(layer, adapter_name)[0].requires_grad_(False)
        if hasattr(layer, "_freeze_non_trainable_peft_weights"):
            # The dictionary is the class's own until replaced.
            layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: ("lora_A",)}
        else:
            forgetful = True
    if forgetful:
        warnings.warn(
            f"PEFT {version('peft')} thaws lora_A whenever an adapter is activated; call freeze_basis_ after each "
            f"set_adapter, or install PEFT 0.21 or later",
            stacklevel=3,
        )


def _checksum(layers: Mapping[str, LoraLayer], adapter_name: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(layers):
        A = factors(layers[name], adapter_name)[0].detach()
        digest.update(name.encode() + A.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
