"""AuON: momentum divided by its norm and by the root mean square of a hyperbolic cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightlab.linalg import newton_schulz
from weightlab.linalg.native_dtype import DtypeChoice, check_dtype
from weightlab.optim import multi_tensor
from weightlab.optim.lr_scaling import AdjustLR, check_adjust_lr, lr_factor
from weightlab.optim.matrix_optimizer import (
    AdamWOptions,
    ApplyTo,
    Directions,
    Group,
    MatrixOptimizer,
    MatrixOptions,
)

Gamma = float | Literal["rms"]

# sinh² x = Σ_k SERIES[k-1]·x^(2k)
_SERIES = (1.0, 1 / 3, 2 / 45, 1 / 315)
# Past it, sinh² of a single entry that holds all the energy overflows float32.
_MAX_GAMMA = 40.0
# f''(y) = Σ_k CURVATURE[k]·y^k for f(y) = sinh²(√y)/y; past 40 terms γ is far too large for a power sum.
_CURVATURE = tuple(2 ** (2 * k - 1) * (k - 1) * (k - 2) / math.factorial(2 * k) for k in range(3, 43))
_RESOLUTION = torch.finfo(torch.float32).eps
# On a CPU, tensors from this size on are braked in pieces that stay in the cache with their temporaries.
_LARGE = 2**15
_PIECE = 2**17


def auon_update(
    update: Tensor,
    *,
    gamma: Gamma = 1.0,
    normalize: bool = True,
    eps: float = 1e-7,
) -> Tensor:
    r"""Divide a momentum tensor U by the brake r, and by its norm unless told otherwise.

    .. math::
        r = \sqrt{\operatorname{mean} \cosh^2 x}, \quad x = \gamma U / (\lVert U \rVert_F + \epsilon)

    The result is :math:`x / (\gamma (r + 10^{-8}))` if `normalize`, else :math:`U / (r + 10^{-8})`. All means
    and norms run over the whole tensor, of N entries, whatever its shape.

    Since :math:`\sum x^2 = \gamma^2`, the brake obeys :math:`1 + \gamma^2/N \le r^2 \le 1 + \sinh^2(\gamma)/N`: the left
    side for equal entries, the right one for a single spike. For weights of any real size r is 1 to
    within a fraction of a per cent whatever the gradient looks like.

    Args:
        update: Any shape, floating point.
        gamma: Gain inside the cosine, in [0, 40]. 1 in the paper's first version, 1.5 in the official
            code; 0 switches the brake off exactly. `"rms"` is *not in the paper*: it takes γ = √N, so that x
            has root mean square 1 and heavy tails do raise r (entries are clamped at ±40).
        normalize: True for the paper's first version, False for the official code.
        eps: Added to the norm.

    Returns:
        A new tensor of the same shape and dtype. Zero for a zero tensor, NaN for one that holds NaN.

    Raises:
        ValueError: If `gamma` is out of range.

    Complexity:
        Linear in N. The cosine itself is only evaluated for small tensors: see `power_sum_widths`.

    References:
        AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates, arXiv 2509.24320.

    Example:
        >>> auon_update(torch.tensor([3.0, 4.0]), gamma=0.0)
        tensor([0.6000, 0.8000])
        >>> auon_update(torch.tensor([3.0, 4.0]), gamma=0.0, normalize=False)
        tensor([3., 4.])
    """
    _check_gamma(gamma)
    if update.numel() == 0:
        return update.clone()
    scales = auon_scales([update], gamma=gamma, normalize=normalize, eps=eps)
    return update.clone() if scales is None else (_upcast(update) * scales[0]).to(update.dtype)


def auon_scales(
    updates: Sequence[Tensor], *, gamma: Gamma, normalize: bool, eps: float
) -> list[Tensor] | None:
    """Factors that make `auon_update` out of each tensor: 0-dim, float32 or float64.

    The tensors share device and dtype. `None` stands for factors of one. Nothing is read back to the
    host.
    """
    if gamma == 0 and not normalize:
        return None
    updates = [_upcast(update) for update in updates]
    norms = torch.stack(multi_tensor.norm(updates))
    inverses = (norms + eps).reciprocal()
    if gamma == 0:
        return list(inverses.unbind())
    sizes = [update.numel() for update in updates]
    if gamma == "rms":
        gains = torch.stack(multi_tensor.mul(inverses.unbind(), [math.sqrt(size) for size in sizes]))
    else:
        gains = inverses * gamma
    energies = _sinh_energies(updates, gains.unbind(), (norms * gains).square().unbind(), gamma)
    squared = torch.stack(multi_tensor.mul(energies, [1 / size for size in sizes])) + 1
    scales = (squared.sqrt() + 1e-8).reciprocal()
    return list((scales * inverses if normalize else scales).unbind())


def _sinh_energies(
    updates: Sequence[Tensor], gains: Sequence[Tensor], first: Sequence[Tensor], gamma: Gamma
) -> list[Tensor]:
    """Sum of `sinh²(gain · update)` for each tensor, given the first power sums.

    Working with `r² − 1` keeps the digits that `mean cosh²` would lose next to one. Power sums save
    arithmetic, which counts for large tensors on a CPU; elsewhere the function is evaluated, unless the
    first power sum will do.
    """
    widths = {} if gamma == "rms" or updates[0].dtype == torch.float64 else power_sum_widths(gamma)
    energies = list(first)
    exact = []
    for i, update in enumerate(updates):
        size = update.numel()
        count = next((count for count, width in widths.items() if width <= 4 * _RESOLUTION * size), 0)
        if count != 1 and (update.device.type != "cpu" or size < _LARGE):
            exact.append(i)
        elif count == 0:
            energies[i] = _exact_energy(update, gains[i])
        else:
            energies[i] = _lower_energy(update, gains[i], first[i], count) + widths[count] / 2
    if exact:
        x = multi_tensor.mul([updates[i] for i in exact], [gains[i] for i in exact])
        if gamma == "rms":
            multi_tensor.clamp_(x, -_MAX_GAMMA, _MAX_GAMMA)
        multi_tensor.sinh_(x)
        for i, root in zip(exact, multi_tensor.norm(x), strict=True):
            energies[i] = root.square()
    return energies


def power_sum_widths(gamma: float) -> dict[int, float]:
    """How closely so many power sums `P_k = Σx^(2k)` fix the sum of `sinh² x` when P₁ = γ².

    The sum is `P₁ + P₂/3 + 2P₃/45 + P₄/315 + …`, whatever the entries are it is at least

    - P₁, and at most `sinh²γ − γ²` more, the largest value of the other terms;
    - P₁·f(P₂/P₁) with `f(y) = sinh²(√y)/y`, and at most `γ⁶·f″(γ²)/8` more: it is P₁ times the mean of
      the convex f over y = x² with weights y/P₁, which lies between f at the mean and the chord of f
      over [0, γ²];
    - the series up to P₄, and at most `sinh²γ − γ² − γ⁴/3 − 2γ⁶/45 − γ⁸/315` more.

    The middle of such an interval of width w gives r, for N entries, to within `w / 4N`.

    Args:
        gamma: Gain inside the cosine.

    Returns:
        Number of power sums (1, 2, 4) -> width.

    Example:
        >>> {count: round(width, 5) for count, width in power_sum_widths(1.0).items()}
        {1: 0.3811, 2: 0.01371, 4: 0.00015}
    """
    y = gamma**2
    first = math.sinh(gamma) ** 2 - y
    curvature = sum(c * y**k for k, c in enumerate(_CURVATURE))
    fourth = first - sum(c * y**k for k, c in enumerate(_SERIES[1:], start=2))
    return {1: first, 2: y**3 * curvature / 8, 4: fourth}


def _lower_energy(update: Tensor, gain: Tensor, first: Tensor, count: int) -> Tensor:
    """The lower ends of the intervals of `power_sum_widths`; temporaries never leave the cache."""
    if count == 1:
        return first
    sums: list[Tensor] = []
    for piece in update.reshape(-1).split(_PIECE):
        squares = (piece * gain).square_()
        sums.append(torch.dot(squares, squares))
        if count == 4:
            fourths = squares.square()
            sums.append(torch.dot(squares, fourths))
            sums.append(torch.dot(fourths, fourths))
    if count == 4:
        second, third, fourth = torch.stack(sums).view(-1, 3).sum(0).unbind()
        return first + _SERIES[1] * second + _SERIES[2] * third + _SERIES[3] * fourth
    # Both floors only keep 0/0 away from a zero tensor.
    root = (torch.stack(sums).sum() / (first + 1e-30)).sqrt() + 1e-12
    return first * (root.sinh() / root).square()


def _exact_energy(update: Tensor, gain: Tensor) -> Tensor:
    sums = []
    for piece in update.reshape(-1).split(_PIECE):
        x = (piece * gain).clamp_(-_MAX_GAMMA, _MAX_GAMMA).sinh_()
        sums.append(torch.dot(x, x))
    return torch.stack(sums).sum()


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_gamma(gamma: Gamma) -> None:
    if gamma != "rms" and (isinstance(gamma, str) or not 0 <= gamma <= _MAX_GAMMA):
        raise ValueError(f'gamma must be in [0, {_MAX_GAMMA:g}] or "rms", got {gamma!r}')


class AuON(MatrixOptimizer):
    r"""AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates (arXiv 2509.24320).

    Momentum is divided by its norm and by a brake r, the root mean square of a hyperbolic cosine of
    the entries. r is ``1 + O(1/N)`` for every tensor of N entries, so that in effect

    - ``normalize=True, gamma=1`` (default; first version of the paper) is normalised SGD with momentum,
    - ``normalize=False, gamma=1.5`` (official code) is SGD with averaged Nesterov momentum,
    - ``ns_steps=1`` or ``5`` (hybrid of the paper, of the code) is Muon without its learning-rate factor.

    With buffer M, gradient G and U the updated (Nesterov) momentum, as in `MatrixOptimizer`:

    .. math::
        X = \mathrm{NS}_{K}(U), \quad W \leftarrow (1 - \eta\lambda) W - \eta\, s\, \mathrm{auon\_update}(X)

    where NS is `newton_schulz` with Muon's coefficients, left out for ``ns_steps=0`` and for vectors. See
    `auon_update` for the rest.

    Differences from the official code: the gradient is left as it is; ``momentum=1``, which never learns,
    is refused; kernels with more than two dimensions are flattened to matrices before NS; there is no
    read-back to the host.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: Learning rate. Default 0.02. The normalised step has norm `lr` whatever the size of the tensor, unless
            `adjust_lr` is set. The official code has 0.24 (for ``normalize=False``).
        momentum: Decay β of the moving average, in [0, 1). Default 0.95.
        weight_decay: Decoupled weight decay. Default 0.
        gamma: Gain inside the cosine, in [0, 40]; 0 switches the brake off; ``"rms"`` is a repair
            *not in the paper* that makes the brake act on heavy tails. See `auon_update`. Default 1.
        nesterov: Look ahead by one step. Default True.
        normalize: Divide by the norm (paper) or not (official code). Default True.
        ns_steps: Newton-Schulz steps before the brake. Default 0.
        ns_dtype: Type of the Newton-Schulz steps. Default None: the parameter's. ``"auto"``: bfloat16 where the device has it
            natively, else float32. `torch.bfloat16`, which `torch.optim.Muon` always uses, takes several times as long where
            it is emulated.
        adjust_lr: ``"original"``: s = √max(1, m/n) for matrices. ``"match_rms_adamw"``: s brings the root
            mean square of the update to about 0.2, AdamW's: 0.2·√N if normalised, else 0.2·√max(m, n)
            after Newton-Schulz, which leaves a semi-orthogonal matrix. Default None: s = 1.
        eps: Added to the norm. Default 1e-7.
        apply_to: ``"all"``: every parameter moves by the rule. ``"matrices"``: vectors, embeddings and heads
            move by AdamW, as told by names if they are given. Default ``"all"``.
        adamw: Options of that AdamW; see `AdamWOptions`.
        maximize: Ascend. Default False.
        foreach: Move many tensors with one kernel. Default None: on accelerators. On CPU one tensor at
            a time is faster.
        **options: ``stacked``, ``split`` and ``nonfinite``; see `MatrixOptions`.

    Raises:
        TypeError: For modules, complex or integer parameters, sparse gradients.
        ValueError: For options out of range, and for ``adjust_lr="match_rms_adamw"`` where the update has no
            scale of its own to match (``normalize=False, ns_steps=0``).

    Complexity:
        Linear in the number of entries; with `ns_steps`, `4·m²·n + 2·m³` flops a step more. One buffer of
        state per parameter: half of AdamW's.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AuON(model.parameters(), lr=0.1)
        >>> model(torch.ones(4)).sum().backward()
        >>> before = model.weight.detach().clone()
        >>> optimizer.step()
        >>> (model.weight.detach() - before).norm().round(decimals=3)  # lr / r, with N = 8
        tensor(0.0940)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: Gamma = 1.0,
        *,
        nesterov: bool = True,
        normalize: bool = True,
        ns_steps: int = 0,
        ns_dtype: DtypeChoice = None,
        adjust_lr: AdjustLR | None = None,
        eps: float = 1e-7,
        apply_to: ApplyTo = "all",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "nesterov": nesterov,
            "normalize": normalize,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr": adjust_lr,
            "eps": eps,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, apply_to=apply_to, adamw=adamw, **options)

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range."""
        super().check_group(group)
        _check_gamma(group["gamma"])
        check_adjust_lr(group["adjust_lr"])
        check_dtype(group["ns_dtype"], "ns_dtype")
        if group["ns_steps"] < 0:
            raise ValueError(f"ns_steps must be at least 0, got {group['ns_steps']}")
        if not group["eps"] > 0:
            raise ValueError(f"eps must be above 0, got {group['eps']}")
        if group["adjust_lr"] == "match_rms_adamw" and not group["normalize"] and group["ns_steps"] == 0:
            raise ValueError(
                'adjust_lr="match_rms_adamw" needs an update of known size, but normalize=False with '
                "ns_steps=0 leaves the gradient's; set normalize=True or ns_steps"
            )

    def batches_equal_shapes(self, group: Group) -> bool:
        """Newton-Schulz takes stacks; the brake alone does not."""
        return group["ns_steps"] > 0

    def cost(self, shape: Sequence[int], group: Group) -> float:
        """As in `MatrixOptimizer` for Newton-Schulz; the brake alone costs nothing to speak of."""
        return super().cost(shape, group) if group["ns_steps"] > 0 else 0.0

    def direction(self, update: Tensor, group: Group) -> Tensor:
        """Orthogonalise matrices, leave vectors alone."""
        return newton_schulz(update, "muon", group["ns_steps"], dtype=group["ns_dtype"])

    def directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """Orthogonalise if asked, then find the factor for each tensor."""
        if group["ns_steps"] > 0 and updates[0].ndim >= 2:
            updates = self.each_direction(updates, group)
        scales = auon_scales(updates, gamma=group["gamma"], normalize=group["normalize"], eps=group["eps"])
        return Directions(updates, scales)

    def lr_factor(self, shape: Sequence[int], group: Group) -> float:
        """Factor on the learning rate: see `adjust_lr`."""
        if group["adjust_lr"] == "match_rms_adamw" and group["normalize"]:
            return 0.2 * math.sqrt(math.prod(shape))
        return lr_factor(shape, group["adjust_lr"])


class HybridAuON(AuON):
    """AuON after Newton-Schulz steps: `AuON` with the hybrid's defaults of the official code.

    ``ns_steps=5, normalize=False, gamma=1.5`` make it Muon without a learning-rate factor, up to a brake
    of 1 + O(1/N). The paper's text has ``ns_steps=1, gamma=1``. Vectors are only braked. All else is as
    in `AuON`.

    References:
        AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates, arXiv 2509.24320.

    Example:
        >>> model = torch.nn.Linear(4, 4, bias=False)
        >>> optimizer = HybridAuON(model.parameters(), lr=0.1, adjust_lr="match_rms_adamw")
        >>> optimizer.param_groups[0]["ns_steps"]
        5
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: Gamma = 1.5,
        *,
        nesterov: bool = True,
        normalize: bool = False,
        ns_steps: int = 5,
        ns_dtype: DtypeChoice = None,
        adjust_lr: AdjustLR | None = None,
        eps: float = 1e-7,
        apply_to: ApplyTo = "all",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            gamma,
            nesterov=nesterov,
            normalize=normalize,
            ns_steps=ns_steps,
            ns_dtype=ns_dtype,
            adjust_lr=adjust_lr,
            eps=eps,
            apply_to=apply_to,
            adamw=adamw,
            maximize=maximize,
            foreach=foreach,
            **options,
        )
