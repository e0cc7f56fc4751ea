"""SORSA: the leading singular triples of each weight train, and stay nearly orthonormal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightlab.adapters._peft import TrainerCallback
from weightlab.adapters.low_rank import Factors, LowRankLayer, low_rank_weight
from weightlab.adapters.registration import register
from weightlab.adapters.tuner import AdapterConfig, AdapterModel, check
from weightlab.linalg.singular_triples import SVDMethod, top_svd

Mode = Literal["coupled", "decoupled"]
Reduction = Literal["mean", "sum"]
Residual = Literal["exact", "in_place"]


@dataclass
class SorsaConfig(AdapterConfig):
    r"""Settings of SORSA.

    Each weight's r leading singular triples, W ≈ U diag(σ) Vᵀ, become a trained adapter B diag(S) A in three factors,
    B = U, S = σ, A = Vᵀ; what trains is r·(out + in + 1) numbers a layer. A regulariser keeps the columns of B and the rows
    of A nearly orthonormal: it has to be applied in training, by `SorsaCallback` under transformers' `Trainer`, by
    `regularize_sorsa` on any optimizer, or by adding `sorsa_regularizer(model)` to the loss.

    Unlike in the official code, the start is subtracted, not taken out of the weight: with
    :math:`\Delta W = \tfrac{\alpha}{r}(B S A - B_0 S_0 A_0)` the model starts exactly as it was in every precision, and
    adapters can be swapped, disabled and put on quantised weights. B₀, S₀ and A₀ are saved with the adapter, so that
    nothing is decomposed again at loading.

    Attributes:
        alpha: The update is scaled by alpha/r. Default None: by 1. (The paper has no scale.)
        gamma: Step size of the regulariser, for the callback and the hook. Default: the official 4e-4.
        reg_mode: `"coupled"` adds gamma / (peak learning rate) times the regulariser's gradient to the loss's, once a
            step and after clipping, as the official trainer does; an adaptive optimizer then sees the mix, not gamma.
            `"decoupled"` moves the factors by gamma times it, as the paper's equation says, following the schedule.
        reg_power: 1, the Frobenius norm of the deviation from orthonormality (the paper's), or 2, its square, which is
            smooth at 0.
        reg_reduction: `"mean"` over all factors of the model (the official code's; each factor's share then falls with
            their number) or `"sum"`.
        residual: `"exact"` subtracts the start in the forward, at the price of one more product of rank r; `"in_place"`
            lets the base layer hold W minus the start while the adapter is active, rounded to its dtype, as the official
            code does, and keeps W aside to restore it bit for bit.
        svd: Method of `weightlab.linalg.top_svd`: `"auto"`, `"full"` or `"randomized"`. In float32 at least, whatever the
            base.

    Raises:
        ValueError: If a field is out of range, or later, if r exceeds a weight's rank or a weight is not finite.

    Complexity:
        Start: one decomposition a weight, O(out·in·min(out, in)) if full, O(out·in·r) if randomized. A step: twice LoRA's
        thin products (once if `in_place`), 2r²·(out + in) FLOP for the regulariser.

    Paper:
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        arXiv 2409.00055.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> x = torch.ones(1, 8)
        >>> y = base(x)
        >>> model = get_peft_model(base, SorsaConfig(r=2, target_modules=["0"]))
        >>> bool((model(x) == y).all()), sum(p.numel() for p in model.parameters() if p.requires_grad)
        (True, 30)
    """

    method = "sorsa"

    alpha: float | None = None
    gamma: float = 4e-4
    reg_mode: Mode = "coupled"
    reg_power: int = 1
    reg_reduction: Reduction = "mean"
    residual: Residual = "exact"
    svd: SVDMethod = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(f"alpha={self.alpha!r}", self.alpha is None or self.alpha > 0, "above 0, or None")
        for name, choices in (("residual", get_args(Residual)), ("svd", get_args(SVDMethod))):
            value = getattr(self, name)
            check(f"{name}={value!r}", value in choices, f"one of {', '.join(choices)}")
        Regularization(self.gamma, self.reg_mode, self.reg_power, self.reg_reduction).validate("reg_")


class Regularization(NamedTuple):
    """How the regulariser acts; see `SorsaConfig`."""

    gamma: float
    mode: Mode
    power: int
    reduction: Reduction

    def validate(self, prefix: str = "") -> None:
        """Check the ranges."""
        check(f"gamma={self.gamma!r}", 0 <= self.gamma < float("inf"), "finite and at least 0")
        check(f"{prefix}mode={self.mode!r}", self.mode in get_args(Mode), "coupled or decoupled")
        check(f"{prefix}power={self.power!r}", self.power in (1, 2), "1 or 2")
        check(f"{prefix}reduction={self.reduction!r}", self.reduction in get_args(Reduction), "mean or sum")


class SorsaLayer(LowRankLayer):
    """A layer whose leading singular triples train."""

    prefix = "sorsa_"
    subtracts_initial = True

    sorsa_left: nn.ParameterDict
    sorsa_right: nn.ParameterDict

    def make_containers(self) -> None:
        """Create empty containers."""
        super().make_containers()
        self.regularization: dict[str, Regularization] = {}
        self.in_place: dict[str, bool] = {}
        self._residual_of: tuple[object, ...] = ()

    def scale_of(self, config: SorsaConfig, r: int) -> float:
        """Return alpha / r."""
        return 1.0 if config.alpha is None else config.alpha / r

    def reset_adapter(self, name: str, config: SorsaConfig, r: int, initialize: bool) -> None:  # type: ignore[override]
        """Create the factors."""
        super().reset_adapter(name, config, r, initialize)
        self.in_place[name] = config.residual == "in_place"
        self.regularization[name] = Regularization(
            config.gamma, config.reg_mode, config.reg_power, config.reg_reduction
        )

    def initial_factors(self, name: str, config: SorsaConfig, r: int) -> Factors:
        """Decompose the weight."""
        triples = top_svd(self.start_matrix(), r, config.svd)
        return Factors(triples.U, triples.S, triples.Vh)

    def place_base(self, names: Sequence[str]) -> None:
        """Let the base layer hold its residual exactly while an in-place adapter is used."""
        active = [name for name in names if self.in_place[name]]
        key = tuple((name, *((id(f), f._version) for f in self._initial_tensors(name))) for name in active)
        if key == self._residual_of:
            return
        self.restore()
        if key:
            with torch.no_grad():
                matrix = self.base_matrix()
                for name in active:
                    start = self.initial(name)
                    assert start is not None
                    matrix = matrix - low_rank_weight(start, scale=self.scaling[name])
                self.hold(matrix)
        self._residual_of = key

    def _initial_tensors(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{self.prefix}initial_{factor}")[name] for factor in Factors._fields]

    def subtracted(self, name: str) -> Factors | None:
        """Return the start, unless the base holds the residual."""
        return None if self.in_place[name] else self.initial(name)


class SorsaModel(AdapterModel):
    """A model with SORSA adapters."""

    prefix = "sorsa_"
    tuner_layer_cls = SorsaLayer


def orthonormality(rows: Tensor, power: int = 1) -> Tensor:
    """Measure how far the rows of a matrix are from orthonormal: ‖A Aᵀ − I‖_F to a power.

    Args:
        rows: A, (..., r, n).
        power: 1 or 2.

    Returns:
        (...,). Its gradient is finite also where it is 0: there 0.

    Complexity:
        2·r²·n FLOP.

    Example:
        >>> orthonormality(2 * torch.eye(3, 5))
        tensor(5.1962)
    """
    deviation = rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    if power == 2:
        return deviation.square().sum((-2, -1))
    return torch.linalg.vector_norm(deviation, dim=(-2, -1))


def orthonormality_gradient(rows: Tensor, power: int = 1) -> Tensor:
    """Compute the gradient of `orthonormality` in closed form, without a graph.

    2 (A Aᵀ − I) A / ‖A Aᵀ − I‖_F for power 1, and 0 where the norm is; 4 (A Aᵀ − I) A for power 2. For power 1 its
    length is about 2 however small the deviation, so that steps of a fixed size end in hovering about 0.

    Args:
        rows: A, (..., r, n).
        power: 1 or 2.

    Returns:
        Like `rows`.

    Complexity:
        4·r²·n FLOP.

    Example:
        >>> orthonormality_gradient(2 * torch.eye(1, 2)), orthonormality_gradient(torch.eye(1, 2))
        (tensor([[4., 0.]]), tensor([[0., 0.]]))
    """
    deviation = rows @ rows.mT
    deviation.diagonal(dim1=-2, dim2=-1).sub_(1)
    if power == 2:
        deviation.mul_(4)
    else:
        norm = torch.linalg.vector_norm(deviation, dim=(-2, -1), keepdim=True)
        deviation.mul_(2 / norm.clamp_min(torch.finfo(norm.dtype).tiny))
    return deviation @ rows


def sorsa_regularizer(
    model: nn.Module,
    *,
    power: Literal[1, 2] = 1,
    reduction: Reduction = "mean",
    adapter_name: str | None = None,
) -> Tensor:
    """Measure how far a model's SORSA factors are from orthonormal, as a term for a loss.

    Args:
        model: The model.
        power: Of the Frobenius norms; see `SorsaConfig`.
        reduction: Over all factors.
        adapter_name: The adapter. Default: all active ones.

    Returns:
        A scalar with a gradient. For training by the official rule, in which the term is neither clipped nor scaled
        with the loss, use `SorsaCallback` or `regularize_sorsa`.

    Raises:
        ValueError: If the model has no such SORSA adapter.

    Paper:
        "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
        arXiv 2409.00055.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SorsaConfig(r=2, target_modules=["0"]))
        >>> bool(sorsa_regularizer(model) < 1e-5)
        True
    """
    Regularization(0.0, "coupled", power, reduction).validate()
    terms = [
        orthonormality(factor.mT if of_left else factor, power)
        for layer, name in _adapters(model, adapter_name)
        for factor, of_left in _bases(layer, name)
    ]
    total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    return total / len(terms) if reduction == "mean" else total


def _adapters(model: nn.Module, adapter_name: str | None = None) -> list[tuple[SorsaLayer, str]]:
    found = [
        (layer, name)
        for layer in model.modules()
        if isinstance(layer, SorsaLayer)
        for name in ([adapter_name] if adapter_name else layer.active_adapters)
        if layer.has_adapter(name)
    ]
    if not found:
        which = f"adapter {adapter_name!r}" if adapter_name else "active adapter"
        raise ValueError(
            f"the model has no {which} by SORSA to regularise: apply SorsaConfig by get_peft_model first"
        )
    return found


def _bases(layer: SorsaLayer, name: str) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield the factors that should be orthonormal, and whether by columns."""
    yield layer.sorsa_left[name], True
    yield layer.sorsa_right[name], False


class _Regularizer:
    """Applies the regulariser at a step: by closed form, between clipping and the optimizer."""

    def __init__(self, overrides: dict[str, Any], peak_lr: float | None) -> None:
        self.overrides = {name: value for name, value in overrides.items() if value is not None}
        Regularization(0.0, "coupled", 1, "mean")._replace(**self.overrides).validate()
        check(f"peak_lr={peak_lr!r}", peak_lr is None or peak_lr > 0, "above 0, or None")
        self.peak_lr = peak_lr
        self.first_lr: dict[int, float] = {}

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizer: Any) -> None:
        adapters = _adapters(model)
        rates = {}
        for number, group in enumerate(optimizer.param_groups):
            lr = float(group["lr"])
            peak = self.peak_lr or float(group.get("initial_lr", self.first_lr.setdefault(number, lr)))
            rates |= dict.fromkeys(map(id, group["params"]), (lr, peak))
        alike: dict[Any, list[tuple[nn.Parameter, bool]]] = {}
        for layer, name in adapters:
            rule = layer.regularization[name]._replace(**self.overrides)
            for factor, of_left in _bases(layer, name):
                if rule.gamma > 0 and factor.requires_grad and id(factor) in rates:
                    shape = factor.shape[::-1] if of_left else factor.shape
                    key = (rule, shape, factor.dtype, factor.device, rates[id(factor)])
                    alike.setdefault(key, []).append((factor, of_left))
        for (rule, _, _, _, (lr, peak)), factors in alike.items():
            if peak == 0:
                continue
            rows = torch.stack([factor.mT if of_left else factor for factor, of_left in factors])
            found = orthonormality_gradient(rows, rule.power).unbind()
            gradients = [g.mT if of_left else g for g, (_, of_left) in zip(found, factors, strict=True)]
            gamma = rule.gamma / (2 * len(adapters)) if rule.reduction == "mean" else rule.gamma
            if rule.mode == "decoupled":
                for (factor, _), gradient in zip(factors, gradients, strict=True):
                    factor.sub_(gradient, alpha=gamma * lr / peak)
                continue
            for (factor, _), gradient in zip(factors, gradients, strict=True):
                if factor.grad is None:
                    factor.grad = torch.zeros_like(factor)
                factor.grad.add_(gradient, alpha=gamma / peak)


def regularize_sorsa(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    gamma: float | None = None,
    mode: Mode | None = None,
    power: Literal[1, 2] | None = None,
    reduction: Reduction | None = None,
    peak_lr: float | None = None,
) -> RemovableHandle:
    """Let every step of an optimizer apply SORSA's regulariser first.

    The loss's gradients are clipped and unscaled by then, and micro-batches are summed, so that the regulariser acts once
    a step and in full, also on every rank alike after gradients are averaged.

    Args:
        optimizer: Optimizer that holds the factors; under accelerate, the one it wraps.
        model: Model with SORSA adapters. Those active at the step are regularised.
        gamma: Default for this and the next three: what the adapter's config says.
        mode: See `SorsaConfig.reg_mode`.
        power: See `SorsaConfig.reg_power`.
        reduction: See `SorsaConfig.reg_reduction`.
        peak_lr: Learning rate at which gamma is the step size. Default: each group's `initial_lr`, which schedulers set,
            else its learning rate at the first step.

    Returns:
        A handle; `handle.remove()` ends it.

    Raises:
        ValueError: If an argument is out of range or the model has no SORSA adapter.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SorsaConfig(r=2, target_modules=["0"]))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = regularize_sorsa(optimizer, model, gamma=1e-3, mode="decoupled")
    """
    overrides = {"gamma": gamma, "mode": mode, "power": power, "reduction": reduction}
    regularizer = _Regularizer(overrides, peak_lr)
    _adapters(model)
    return optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: regularizer.apply(model, optimizer)
    )


class SorsaCallback(TrainerCallback):
    """Applies SORSA's regulariser in transformers' `Trainer`, after clipping and before the optimizer's step.

    Args:
        gamma: Default for this and the others: what the adapter's config says.
        mode: See `SorsaConfig.reg_mode`.
        power: See `SorsaConfig.reg_power`.
        reduction: See `SorsaConfig.reg_reduction`.

    With fp16 the loss's gradients are unscaled by then only if they are clipped, which is the `Trainer`'s default.

    Example:
        >>> callback = SorsaCallback(gamma=1e-3)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        gamma: float | None = None,
        mode: Mode | None = None,
        power: Literal[1, 2] | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self.overrides = {"gamma": gamma, "mode": mode, "power": power, "reduction": reduction}
        self.regularizer = _Regularizer(self.overrides, None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the run's learning rate as the peak."""
        self.regularizer = _Regularizer(self.overrides, args.learning_rate or None)
        _adapters(kwargs["model"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply the regulariser."""
        self.regularizer.apply(kwargs["model"], kwargs["optimizer"])


register()
