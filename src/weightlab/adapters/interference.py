"""How much two adapters disturb each other: between their weights, and on real inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.adapters.lora_layers import LoraLayer, check_additive, holds, lora_layers, matrices
from weightlab.adapters.merging import overlap


@dataclass(frozen=True)
class LayerCrosstalk:
    """What one layer has of it.

    Attributes:
        layer: Name inside the base model.
        product: ``‖ΔWₐ ΔW_bᵀ‖ / (‖ΔWₐ‖ ‖ΔW_b‖)``, the paper's measure; 0 where an adapter does nothing.
        overlap: ``‖BₐᵀB_b‖`` of the down-projections with columns scaled to norm 1.
        leak: ``‖ΔW_b x‖ / ‖W x‖`` over the inputs x; NaN without inputs.
        relative_leak: ``‖ΔW_b x‖ / ‖ΔWₐ x‖`` over the inputs x of adapter a; NaN without inputs.
    """

    layer: str
    product: float
    overlap: float
    leak: float = math.nan
    relative_leak: float = math.nan


@dataclass(frozen=True)
class Crosstalk:
    """How much adapter b disturbs adapter a.

    Attributes:
        a: The adapter whose inputs were run.
        b: The other one.
        layers: Layer by layer.
    """

    a: str
    b: str
    layers: tuple[LayerCrosstalk, ...]

    @property
    def product(self) -> float:
        """Mean over layers of the normalised product norm."""
        return self._mean("product")

    @property
    def leak(self) -> float:
        """Mean over layers of ``‖ΔW_b x‖ / ‖W x‖``."""
        return self._mean("leak")

    @property
    def relative_leak(self) -> float:
        """Mean over layers of ``‖ΔW_b x‖ / ‖ΔWₐ x‖``."""
        return self._mean("relative_leak")

    def _mean(self, name: str) -> float:
        return sum(getattr(layer, name) for layer in self.layers) / len(self.layers)

    def table(self) -> str:
        """Return a table of all layers and their mean."""
        width = max(len("layer"), *(len(layer.layer) for layer in self.layers))
        lines = [f"{'layer':{width}}  product  overlap  leak/Wx  leak/own"]
        overlaps = sum(layer.overlap for layer in self.layers) / len(self.layers)
        mean = LayerCrosstalk("mean", self.product, overlaps, self.leak, self.relative_leak)
        for row in (*self.layers, mean):
            lines.append(
                f"{row.layer:{width}}  {row.product:7.4f}  {row.overlap:7.4f}  {row.leak:7.4f}  {row.relative_leak:8.4f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def crosstalk(model: nn.Module, a: str, b: str, inputs: Any = None) -> Crosstalk:
    """Measure how much LoRA b disturbs LoRA a when both are added up.

    Two measures, which need not agree. The paper's looks at weights alone: the normalised norm of
    ``ΔWₐ ΔW_bᵀ``, exactly 0 for disjoint columns of a shared basis. What disturbs is ``ΔW_b x`` on the inputs x
    of a, which is not zero then; with `inputs`, the model is run on them with adapter a active, and every
    layer's x is taken as it comes. Outputs and everything behind them, where adapters interfere too, are not
    looked at.

    Args:
        model: A PEFT model, its tuner, or a model with injected adapters. Left as it was.
        a: The adapter that is disturbed.
        b: The one that disturbs.
        inputs: Inputs of concept a: a tensor, a mapping (passed as keywords), a tuple (passed as arguments), or
            an iterable of such batches. Default: weights only.

    Returns:
        A `Crosstalk`, of the layers that both adapt; norms over all inputs and positions.

    Raises:
        ValueError: If an adapter is unknown or not additive (DoRA, variants), if both adapt no common layer, if
            one is merged, if `inputs` is empty, or if a layer did not run on it.

    Complexity:
        O((m + n) r²) a layer, ΔW is never formed; with inputs, a forward pass and O((m + n) r) a position.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config, "cat")
        >>> model.add_adapter("dog", config)
        >>> report = crosstalk(model, "cat", "dog", torch.randn(5, 8))
        >>> report.layers[0].layer, report.product <= 1, report.relative_leak > 0
        ('0', True, True)
    """
    layers = {key: layer for key, layer in lora_layers(model, a).items() if holds(layer, b)}
    if not layers:
        lora_layers(model, b)
        raise ValueError(f"adapters {a!r} and {b!r} adapt no layer in common")
    for key, layer in layers.items():
        check_additive(key, layer, a)
        check_additive(key, layer, b)
        if layer.merged_adapters:
            raise ValueError(f"{key} holds {layer.merged_adapters} in its weight; unmerge them first")
    leaks = {} if inputs is None else _leaks(model, layers, a, b, _batches(inputs))
    return Crosstalk(a, b, tuple(_of_layer(key, layer, a, b, leaks) for key, layer in layers.items()))


def _of_layer(
    key: str, layer: LoraLayer, a: str, b: str, leaks: Mapping[str, tuple[float, float]]
) -> LayerCrosstalk:
    (A, U), (C, V) = matrices(layer, a), matrices(layer, b)
    return LayerCrosstalk(key, product_norm(A, U, C, V), overlap(A, C), *leaks.get(key, ()))


def product_norm(A: Tensor, U: Tensor, C: Tensor, V: Tensor) -> float:
    """Return ``‖UA (VC)ᵀ‖ / (‖UA‖ ‖VC‖)`` of low-rank matrices, and 0 if one of them is zero.

    With QR factors ``U = Q R`` and ``V = P S`` it is ``‖R (A Cᵀ) Sᵀ‖`` and so on: no m×n matrix is formed.

    Args:
        A: Shape `(r, n)`.
        U: Shape `(m, r)`.
        C: Shape `(s, n)`.
        V: Shape `(m, s)`.

    Example:
        >>> I = torch.eye(4)
        >>> product_norm(I[:2], I[:, :2], I[2:], I[:, :2]), product_norm(I[:1], I[:, :1], I[:1], I[:, 1:2])
        (0.0, 1.0)
    """
    R, S = (torch.linalg.qr(M, mode="r").R for M in (U, V))
    norms = (R @ A).norm() * (S @ C).norm()
    return float((R @ (A @ C.mT) @ S.mT).norm() / norms) if norms > 0 else 0.0


def _batches(inputs: Any) -> Iterable[Any]:
    return [inputs] if isinstance(inputs, Tensor | Mapping | tuple) else inputs


def _leaks(
    model: nn.Module, layers: Mapping[str, LoraLayer], a: str, b: str, batches: Iterable[Any]
) -> dict[str, tuple[float, float]]:
    squares = {key: torch.zeros(3, dtype=torch.float64) for key in layers}

    def hook(key: str, layer: LoraLayer) -> Any:
        def add(base: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0]
            own, other = (_update(layer, name, x) for name in (a, b))
            bias = getattr(base, "bias", None)
            if bias is not None:
                output = output - bias.reshape(-1, *[1] * (output.ndim - 2) * isinstance(base, nn.Conv2d))
            squares[key] += torch.stack([part.double().square().sum().cpu() for part in (output, own, other)])

        return add

    ran = False
    with ExitStack() as stack:
        stack.enter_context(_only(model, a))
        for key, layer in layers.items():
            handle = layer.get_base_layer().register_forward_hook(hook(key, layer))
            stack.callback(handle.remove)
        for batch in batches:
            ran = True
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch if isinstance(batch, tuple) else (batch,))
    if not ran:
        raise ValueError("inputs holds no batch; give a tensor, a mapping, or a list of them")
    if idle := [key for key, sums in squares.items() if not sums[0] > 0]:
        raise ValueError(f"layers {', '.join(idle)} did not run on the inputs")
    return {
        key: (math.sqrt(other / base), math.sqrt(other / own) if own > 0 else math.inf if other > 0 else 0.0)
        for key, sums in squares.items()
        for base, own, other in [sums.tolist()]
    }


def _update(layer: LoraLayer, name: str, x: Tensor) -> Tensor:
    scaling = layer.scaling[name]
    if name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return F.embedding(x, A.mT) @ B.mT * scaling
    A = layer.lora_A[name]
    return layer.lora_B[name](A(x.to(A.weight.dtype))) * scaling  # type: ignore[arg-type, operator]


@contextmanager
def _only(model: nn.Module, name: str) -> Iterator[None]:
    """Let one adapter alone be active, without dropout; PEFT's own switch would thaw and freeze parameters."""
    training = [(module, module.training) for module in model.modules()]
    states = [
        (module, module._active_adapter, module._disable_adapters)
        for module in model.modules()
        if isinstance(module, LoraLayer)
    ]
    model.eval()
    for layer, _, _ in states:
        layer._active_adapter, layer._disable_adapters = [name], False
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for layer, active, disabled in states:
            layer._active_adapter, layer._disable_adapters = active, disabled
