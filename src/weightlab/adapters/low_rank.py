r"""Adapters of low rank: ΔW = scale · (L diag(s) R − L₀ diag(s₀) R₀).

Most ways to fine-tune from what a weight already knows have this form. They differ in where the factors come from
and in which of them train. Where the factors start at a part of the weight, their initial values are subtracted, so
that the model starts as it was and the base weight stays as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from weightlab.adapters._peft import BufferDict
from weightlab.adapters.layouts import ConvolutionLayout, EmbeddingLayout
from weightlab.adapters.tuner import AdapterConfig, AdapterLayer

Role = Literal["trained", "frozen", "absent"]


class Roles(NamedTuple):
    """What becomes of each factor: trained, frozen (saved all the same), or absent (`values` only: ones)."""

    left: Role = "trained"
    values: Role = "trained"
    right: Role = "trained"


class Factors(NamedTuple):
    """The factors of L diag(s) R.

    Attributes:
        left: L, (out, r).
        values: s, (r,); None stands for ones.
        right: R, (r, in).
    """

    left: Tensor
    values: Tensor | None
    right: Tensor

    @property
    def scaled_left(self) -> Tensor:
        """L diag(s), (out, r)."""
        return self.left if self.values is None else self.left * self.values


def low_rank_weight(factors: Factors, initial: Factors | None = None, scale: float = 1.0) -> Tensor:
    r"""Compute ΔW = scale · (L diag(s) R − L₀ diag(s₀) R₀).

    The difference is formed from differences of factors, P (R − R₀) + (P − P₀) R₀ with P = L diag(s): it is exactly zero
    at the start, and keeps its relative precision near it.

    Args:
        factors: L, s, R.
        initial: L₀, s₀, R₀ of the same shapes. Default: nothing is subtracted.
        scale: A factor to the whole.

    Returns:
        (out, in).

    Complexity:
        2·out·in·r FLOP, twice that with `initial`.

    Example:
        >>> factors = Factors(torch.ones(2, 1), torch.tensor([3.0]), torch.ones(1, 2))
        >>> low_rank_weight(factors)
        tensor([[3., 3.],
                [3., 3.]])
        >>> low_rank_weight(factors, factors).count_nonzero()
        tensor(0)
    """
    right, left = lora_form(factors, initial, scale)
    return left @ right


def lora_form(factors: Factors, initial: Factors | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Write ΔW as a product of two factors: A (k, in) and B (out, k) with ΔW = B A, k = r, or 2r with `initial`.

    Example:
        >>> one = Factors(torch.ones(4, 1), None, torch.ones(1, 3))
        >>> [tuple(m.shape) for m in lora_form(one, one)]
        [(2, 3), (4, 2)]
    """
    left = factors.scaled_left
    if initial is None:
        return factors.right, left * scale
    right = torch.cat([factors.right - initial.right, initial.right])
    return right, torch.cat([left, left - initial.scaled_left], dim=1) * scale


def low_rank_linear(
    x: Tensor,
    factors: Factors,
    initial: Factors | None = None,
    scale: float = 1.0,
    *,
    result: Tensor | None = None,
    dtype: torch.dtype | None = None,
    fold: bool | None = None,
) -> Tensor:
    r"""Compute `result` + x ΔWᵀ without forming ΔW.

    With `initial` both parts go through one product of width 2r each way, and only the trained half is
    differentiated by the weights. There are no second derivatives in that case.

    Args:
        x: (..., in).
        factors: L, s, R.
        initial: L₀, s₀, R₀, which get no gradient.
        scale: A factor to the whole.
        result: (..., out), to be added. Default: nothing.
        dtype: Dtype of the products; differences of factors are formed in their own. Default: that of the factors.
        fold: Multiply s into L, which is small and then has a gradient, not into the tokens' features. Default: if L
            has one anyway. Without it, only r numbers a token are kept for the backward pass of s. No matter with
            `initial`.

    Returns:
        (..., out), of `dtype`.

    Complexity:
        2·r·(in + out) FLOP a token, twice that with `initial`.

    Example:
        >>> factors = Factors(torch.eye(2), torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> low_rank_linear(torch.tensor([1.0, 1.0]), factors)
        tensor([1., 2.])
        >>> low_rank_linear(torch.tensor([1.0, 1.0]), factors, factors, result=torch.ones(2))
        tensor([1., 1.])
    """
    dtype = dtype or factors.right.dtype
    x = x.to(dtype)
    if initial is not None:
        if result is None:
            result = x.new_zeros(*x.shape[:-1], factors.left.shape[0])
        return _Difference.apply(result.to(dtype), x, *factors, *initial, scale)  # type: ignore[return-value]
    if factors.values is None or (factors.left.requires_grad if fold is None else fold):
        features, left = F.linear(x, factors.right.to(dtype)), (factors.scaled_left * scale).to(dtype)
    else:
        features = F.linear(x, factors.right.to(dtype)) * (factors.values * scale).to(dtype)
        left = factors.left.to(dtype)
    delta = F.linear(features, left)
    return delta if result is None else result.to(dtype) + delta


class _Difference(torch.autograd.Function):
    """Add x ΔWᵀ for a difference of two products, with gradients for the first alone."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        left: Tensor,
        values: Tensor | None,
        right: Tensor,
        initial_left: Tensor,
        initial_values: Tensor | None,
        initial_right: Tensor,
        scale: float,
    ) -> Tensor:
        wide_right, wide_left = lora_form(
            Factors(left, values, right), Factors(initial_left, initial_values, initial_right), scale
        )
        wide_right, wide_left = wide_right.to(x.dtype), wide_left.to(x.dtype)
        inputs = x.reshape(-1, x.shape[-1])
        features = inputs @ wide_right.mT
        total = torch.addmm(result.reshape(-1, result.shape[-1]), features, wide_left.mT)
        r = right.shape[0]
        ctx.save_for_backward(inputs, features[:, :r] + features[:, r:], wide_right, wide_left, left, values)
        ctx.scale, ctx.shape = scale, x.shape
        return total.view(result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, features, wide_right, wide_left, left, values = ctx.saved_tensors
        grad = grad_outputs[0]
        g = grad.reshape(-1, grad.shape[-1])
        projected = g @ wide_left
        of_x = (projected @ wide_right).view(ctx.shape) if ctx.needs_input_grad[1] else None
        of_left = of_values = of_right = None
        if ctx.needs_input_grad[4]:
            r = left.shape[1]
            of_right = (projected[:, :r].mT @ inputs).to(left.dtype)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            of_scaled = (g.mT @ features).to(left.dtype) * ctx.scale
            of_left = of_scaled if values is None else of_scaled * values
            if values is not None:
                of_values = (of_scaled * left).sum(0)
        return grad, of_x, of_left, of_values, of_right, None, None, None, None


class LowRankLayer(AdapterLayer):
    """An adapter layer of low rank: which factors train is said by the class, where they start by one method.

    A subclass sets

    * `roles`: which factors train;
    * `subtracts_initial`: whether the factors start at a part of the weight, which is then subtracted. The initial
      factors of those that train are saved with the adapter;
    * `initial_factors(name, config, r)`: where they start;
    * optionally `scale_of(config, r)`, default 1, and `factors(name)`, if what is stored is not yet what multiplies.

    Factors are stored as `<prefix>left`, `<prefix>values`, `<prefix>right` and `<prefix>initial_left` and so on.
    """

    roles: ClassVar[Roles] = Roles()
    subtracts_initial: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        by_role = {
            role: [n for n in Factors._fields if getattr(cls.roles, n) == role]
            for role in ("trained", "frozen")
        }
        initial = by_role["trained"] if cls.subtracts_initial else []
        cls.adapter_layer_names = tuple(cls.prefix + name for name in by_role["trained"])
        cls.other_param_names = (
            *(cls.prefix + name for name in by_role["frozen"]),
            *(f"{cls.prefix}initial_{name}" for name in initial),
            "scaling",
        )

    def make_containers(self) -> None:
        """Create an empty container for every factor."""
        self.scaling: dict[str, float] = {}
        self._unfilled: set[str] = set()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            if name.startswith(self.prefix):
                setattr(self, name, BufferDict(persistent=True))

    def initial_factors(self, name: str, config: Any, r: int) -> Factors:
        """Compute where an adapter starts, e.g. from `self.start_matrix()`."""
        raise NotImplementedError

    def scale_of(self, config: Any, r: int) -> float:
        """Return the factor to ΔW."""
        return 1.0

    def reset_adapter(self, name: str, config: AdapterConfig, r: int, initialize: bool) -> None:
        """Create the factors, and fill them if `initialize`.

        Raises:
            ValueError: If the rank exceeds the matrix's.
        """
        out, inputs = self.shape
        if r > min(out, inputs):
            raise ValueError(
                f"r={r} exceeds the rank of {self.key!r}, whose weight is {out} x {inputs}; choose r of at most "
                f"{min(out, inputs)}, or another in rank_pattern for this layer"
            )
        self.scaling[name] = self.scale_of(config, r)
        start = self.initial_factors(name, config, r) if initialize else None
        shapes = {"left": (out, r), "values": (r,), "right": (r, inputs)}
        for factor, role in self.roles._asdict().items():
            if role == "absent":
                continue
            value = getattr(start, factor) if start else self.new_buffer(*shapes[factor])
            self._container(factor)[name] = (
                nn.Parameter(value.contiguous()) if role == "trained" else value.contiguous()
            )
            if role == "trained" and self.subtracts_initial:
                self._container(f"initial_{factor}")[name] = value.clone(
                    memory_format=torch.contiguous_format
                )
        if not initialize:
            self._unfilled.add(name)

    def _container(self, factor: str) -> Any:
        return getattr(self, self.prefix + factor)

    def factors(self, name: str) -> Factors:
        """Return L, s, R as they multiply."""
        return self._gather(name, "")

    def initial(self, name: str) -> Factors | None:
        """Return L₀, s₀, R₀, or None if nothing is subtracted."""
        return self._gather(name, "initial_") if self.subtracts_initial else None

    def subtracted(self, name: str) -> Factors | None:
        """Return what the forward subtracts: `initial`, unless the base weight already lacks it."""
        return self.initial(name)

    def _gather(self, name: str, stage: str) -> Factors:
        found = {
            factor: None
            if role == "absent"
            else self._container(stage + factor if role == "trained" else factor)[name]
            for factor, role in self.roles._asdict().items()
        }
        return Factors(**found)  # type: ignore[arg-type]

    def prepare(self, names: Any) -> None:
        """Make sure that adapters created without values have got some since.

        Raises:
            RuntimeError: If one has not.
        """
        for name in self._unfilled.intersection(names):
            factors = [factor for factor in self._gather(name, "") if factor is not None]
            if not all(factor.count_nonzero() for factor in factors):
                raise RuntimeError(
                    f"adapter {name!r} of {self.key!r} was created with init_weights=False, and nothing has been "
                    "loaded into it; load it by PeftModel.from_pretrained, or set init_weights=True"
                )
            self._unfilled.discard(name)

    def delta_weight(self, name: str) -> Tensor:
        """Return ΔW, (out, in)."""
        self.prepare([name])
        return low_rank_weight(self.factors(name), self.initial(name), self.scaling[name])

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a LoRA that does the same, of rank r, or 2r if initial factors are subtracted."""
        self.prepare([name])
        right, left = lora_form(self.factors(name), self.initial(name), self.scaling[name])
        return right.detach(), left.detach()

    def adapt(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """Add the adapter's share of the output."""
        factors, initial, scale = self.factors(name), self.subtracted(name), self.scaling[name]
        dtype = self.compute_dtype(x, factors.right.dtype)
        if not isinstance(self.layout, EmbeddingLayout | ConvolutionLayout):
            fold = self.roles.left == "trained"
            return low_rank_linear(x, factors, initial, scale, result=result, dtype=dtype, fold=fold)
        base = self.get_base_layer()
        right, left = lora_form(factors, initial, scale)
        features = self.layout.project(base, self._input(x, dtype), right.to(dtype))
        return result + self.layout.expand(base, features, left.to(dtype))
