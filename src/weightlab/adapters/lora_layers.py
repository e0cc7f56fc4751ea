"""PEFT's LoRA layers: finding them, and reading their factors."""

from __future__ import annotations

from torch import Tensor, nn

from weightlab.adapters._peft import internals

with internals():
    from peft.tuners.lora import LoraLayer

PEFT_PREFIX = "base_model.model."


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers that hold a LoRA, by their names inside the base model.

    Args:
        model: A PEFT model, its tuner, or a model with an injected adapter.
        adapter_name: The LoRA.

    Raises:
        ValueError: If there is no LoRA of that name; the message names those that there are.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(target_modules=["0"]))
        >>> list(lora_layers(model, "default"))
        ['0']
    """
    layers = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    found = {name: layer for name, layer in layers.items() if holds(layer, adapter_name)}
    if not found:
        others = sorted(
            {other for layer in layers.values() for other in (*layer.lora_A, *layer.lora_embedding_A)}
        )
        raise ValueError(
            f"the model has no LoRA named {adapter_name!r}; it has {', '.join(map(repr, others)) or 'none'}"
        )
    return found


def holds(layer: LoraLayer, adapter_name: str) -> bool:
    """Tell whether a layer holds a LoRA."""
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return PEFT's own lora_A `(r, …)` and lora_B `(m, r, …)` of a layer, not copies."""
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight  # type: ignore[return-value]
    return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]


def matrices(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return the factors as matrices A `(r, n)` and B `(m, r)` in at least float32, detached, kernels flattened."""
    A, B = (factor.detach().flatten(1) for factor in factors(layer, adapter_name))
    return A if A.dtype.itemsize > 2 else A.float(), B if B.dtype.itemsize > 2 else B.float()


def check_additive(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Refuse an adapter whose effect on a layer is not the sum of the layer and ``scaling·B·A``.

    Raises:
        ValueError: For DoRA and other variants, trained biases, and LoRA on bare parameters.
    """
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    if layer.use_dora.get(adapter_name):
        what = "use_dora=True"
    elif variant is not None:
        what = type(variant).__name__
    elif layer.lora_bias.get(adapter_name):
        what = "lora_bias=True"
    elif hasattr(layer, "parameter_name"):
        what = "target_parameters"
    else:
        return
    raise ValueError(
        f"adapter {adapter_name!r} is no plain LoRA on {name}: it was made with {what}, and then its effect is not "
        f"the sum of base weight and scaling·B·A; train it without"
    )
