"""Writing an adapter as a plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from weightlab.adapters._peft import (
    SAFETENSORS_WEIGHTS_NAME,
    BaseTuner,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
)
from weightlab.adapters.layouts import ConvolutionLayout, EmbeddingLayout
from weightlab.adapters.tuner import AdapterConfig, AdapterLayer

PEFT_PREFIX = "base_model.model."


def to_lora(
    model: nn.Module, adapter_name: str = "default", path: str | Path | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Turn an adapter of low rank into a plain LoRA that does the same on the same base model.

    Nothing is approximated: the LoRA's rank is that of the update's own factors, r, or 2r where initial factors are
    subtracted; its scale is 1. Trained biases and saved modules come along.

    Args:
        model: The model that holds the adapter: a PEFT model, its tuner, or a model with an injected adapter.
        adapter_name: The adapter.
        path: Folder to write `adapter_config.json` and `adapter_model.safetensors` to. Default: write nothing.

    Returns:
        The config, and the state dict as in the file. Any program that loads LoRA adapters can load them.

    Raises:
        ValueError: If there is no such adapter.
        TypeError: If an update is not of low rank, or the layer is a convolution of a kind that PEFT's LoRA gets wrong:
            it ignores dilation and padding modes.

    Example:
        >>> from peft import get_peft_model
        >>> from weightlab.adapters import SorsaConfig
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SorsaConfig(r=2, target_modules=["0"]))
        >>> config, state = to_lora(model)
        >>> config.r, {name: tuple(tensor.shape) for name, tensor in state.items()}
        (4, {'base_model.model.0.lora_A.weight': (4, 8), 'base_model.model.0.lora_B.weight': (6, 4)})
    """
    model = _unwrapped(model)
    layers = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, AdapterLayer) and module.has_adapter(adapter_name)
    }
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}: the model has no adapter of that name by weightlab")
    factors = {key: layer.lora_factors(adapter_name) for key, layer in layers.items()}
    ranks = {key: right.shape[0] for key, (right, _) in factors.items()}
    r = max(ranks.values(), key=list(ranks.values()).count)
    pattern = {key: rank for key, rank in ranks.items() if rank != r}
    source: AdapterConfig = model.peft_config[adapter_name]  # type: ignore[assignment, index]
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(layers),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=source.dropout,
        bias="lora_only" if source.bias.endswith("_only") else source.bias,  # type: ignore[arg-type]
        modules_to_save=source.modules_to_save,
        fan_in_fan_out=all(layer.layout.transposed for layer in layers.values()),
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
    )
    state = _other_state(model, adapter_name, layers)
    for key, (right, left) in factors.items():
        state |= _entries(key, layers[key], right, left)
    if path is not None:
        config.save_pretrained(str(path))
        save_file(state, Path(path) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return config, state


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        model = model.base_model
    return model.model if isinstance(model, BaseTuner) else model


def _entries(key: str, layer: AdapterLayer, right: Tensor, left: Tensor) -> dict[str, Tensor]:
    stem = f"{PEFT_PREFIX}{key}.lora_"
    right, left = right.contiguous(), left.contiguous()
    if isinstance(layer.layout, EmbeddingLayout):
        return {f"{stem}embedding_A": right, f"{stem}embedding_B": left}
    if isinstance(layer.layout, ConvolutionLayout):
        base: Any = layer.get_base_layer()
        if set(base.dilation) != {1} or base.padding_mode != "zeros":
            raise TypeError(
                f"{key!r} is a convolution with dilation={base.dilation} and padding_mode={base.padding_mode!r}, which "
                "LoRA in PEFT ignores; merge the adapter instead"
            )
        right = layer.layout.weight(right)
        left = left.reshape(*left.shape, *(1 for _ in layer.layout.kernel[1:]))
    return {f"{stem}A.weight": right, f"{stem}B.weight": left}


def _other_state(model: nn.Module, adapter_name: str, layers: dict[str, AdapterLayer]) -> dict[str, Tensor]:
    """What PEFT saves beside the adapter's own tensors: biases, modules_to_save."""
    prefix = next(iter(layers.values())).prefix
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    others = {key: value for key, value in saved.items() if f".{prefix}" not in key}
    return {PEFT_PREFIX + key: value.contiguous() for key, value in others.items()}
