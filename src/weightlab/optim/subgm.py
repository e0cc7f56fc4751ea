"""SubGM as a torch optimizer: normalised sub-gradient steps that shrink geometrically."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightlab.optim import multi_tensor
from weightlab.optim.gradients import refuse_sparse
from weightlab.optim.robust_recovery import auto_decay


class SubGM(Optimizer):
    r"""Sub-gradient method with small initialisation and geometric, normalised steps (arXiv 2202.08788).

    For factors U of a model that sees ``U Uᵀ`` under an absolute-error loss, started near zero, as by
    `small_spectral_`. With D the gradient of U,

    .. math::
        U \leftarrow U - 2 \eta_t \frac{\|U\|_F}{\|D\|_F} D, \qquad \eta_t = \mathrm{lr} \cdot \mathrm{decay}^t,

    so that a factor moves by the share ``2 η_t`` of its own norm: a tiny one grows exponentially, and neither
    the scale of the loss nor that of U counts.

    **Difference from the paper** ("Global Convergence of Sub-gradient Method for Robust Matrix Recovery: Small
    Initialization, Noisy Measurements, and Over-parameterization"): there ``D = 2 Q U`` is divided by
    ``‖Q‖_F``. An optimizer does not see Q, and ``‖D‖_F / (2‖U‖_F)``, which is at most its spectral norm, stands in
    for it. They agree, up to the √r between the two norms, while U lies in the leading directions of Q, as it
    does during growth. Near the solution U and Q have little in common, steps are longer than the paper's, and
    superfluous directions end larger. Where measurements are linear, `robust_recover` follows the paper.

    A parameter that is all zero stays zero: to the method, the origin is a stationary point.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either. Each is normalised by itself.
        lr: First step as half the share of the factor's norm. Default 0.2. Schedulers scale it on top
            of `decay`.
        decay: Factor on the step, from one to the next, in (0, 1]; 1 leaves shrinking to a scheduler. Default
            ``"auto"``: ``1 − 0.5·lr / max(1, ln(1/alpha))``, which lets a start of relative size `alpha` grow
            to full size. A faster decay never gets there.
        alpha: Size of the start relative to the solution's, in (0, 1); only used by ``decay="auto"``.
            Default 1e-4.
        foreach: Move many tensors with one kernel. Default None: on accelerators.

    Raises:
        TypeError: For complex or integer parameters; at `step`, for sparse gradients.
        ValueError: For options out of range.

    Complexity:
        Two norms and one update: four passes over memory. State: a step count.

    Example:
        >>> U = torch.nn.Parameter(1e-3 * torch.ones(3, 1))
        >>> optimizer = SubGM([U], lr=0.2, alpha=1e-3)
        >>> for _ in range(1500):
        ...     optimizer.zero_grad()
        ...     (U @ U.T - torch.ones(3, 3)).abs().mean().backward()
        ...     optimizer.step()
        >>> bool((U.detach().abs() - 1).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.2,
        decay: float | Literal["auto"] = "auto",
        alpha: float = 1e-4,
        *,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "alpha": alpha, "foreach": foreach})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if group["decay"] == "auto":
            group["decay"] = auto_decay(float(group["lr"]), group["alpha"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the loss, which `step` returns then.

        Raises:
            TypeError: If a gradient is sparse; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                refuse_sparse(self, p)
        for group in self.param_groups:
            batches: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                count = self.state[p].setdefault("step", torch.zeros((), dtype=torch.float64))
                eta = float(group["lr"]) * group["decay"] ** count.item()
                count += 1
                together = p.device.type != "cpu" if group["foreach"] is None else group["foreach"]
                batches[(p.device, p.dtype, eta, None if together else id(p))].append(p)
            for (*_, eta, _), batch in batches.items():
                _relative_step(batch, 2 * eta)
        return loss


def _relative_step(params: list[Tensor], share: float) -> None:
    """Move each parameter against its gradient by a share of its own norm."""
    grads = [p.grad for p in params if p.grad is not None]
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    sizes = torch.stack(multi_tensor.norm(params)).to(dtype)
    slopes = torch.stack(multi_tensor.norm(grads)).to(dtype)
    ratios = torch.where(slopes > 0, sizes / slopes, 0.0)
    # A NaN in a gradient must show, as it does with every other optimizer.
    ratios = torch.where(slopes.isnan(), slopes, ratios).to(params[0].dtype)
    multi_tensor.addcmul_(params, grads, list(ratios.unbind()), [-share] * len(params))


def _check_group(group: dict[str, Any]) -> None:
    lr, decay, alpha = group["lr"], group["decay"], group["alpha"]
    if not 0 < float(lr) < 1:
        raise ValueError(f"lr must be between 0 and 1, both excluded, got {lr}")
    if decay != "auto" and (isinstance(decay, str) or not 0 < decay <= 1):
        raise ValueError(f'decay must be "auto" or in (0, 1], got {decay!r}')
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, both excluded, got {alpha}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(
                f"SubGM moves real floating-point parameters, got {p.dtype} of shape {tuple(p.shape)}; "
                "give it to another optimizer"
            )
