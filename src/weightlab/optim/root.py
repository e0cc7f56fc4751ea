"""ROOT: momentum clipped at a quantile, orthogonalised with coefficients that fit its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightlab.linalg import clip_outliers, newton_schulz
from weightlab.linalg.coefficients import CoefficientSet, resolve_coefficients
from weightlab.linalg.matrix_sign import newton_schulz_foreach
from weightlab.linalg.native_dtype import DtypeChoice, check_dtype
from weightlab.linalg.outliers import check_quantile
from weightlab.linalg.padding import common_shape
from weightlab.optim.lr_scaling import AdjustLR, check_adjust_lr, lr_factor
from weightlab.optim.matrix_optimizer import (
    AdamWOptions,
    ApplyTo,
    Directions,
    Group,
    MatrixOptimizer,
    MatrixOptions,
)

Triples = Sequence[Sequence[float]]
Coefficients = str | Triples | Mapping[tuple[int, int], Triples]

# The official code adds it to the quantile, so that a matrix with few entries that are not zero still moves.
_QUANTILE_EPS = 1e-9
# Larger matrices take longer for the zeros that pad them than for calls of their own.
_PADDED_BELOW = 64


class RootOptions(TypedDict, total=False):
    """What of `ROOT` a parameter group may set for itself, besides what every `MatrixOptimizer` takes.

    Attributes:
        clip_quantile: Quantile of the absolute values at which entries are clipped; `None` leaves them.
        clip_sample: Entries of a matrix to estimate that quantile from; `None` for all.
        coefficients: Of the Newton-Schulz steps: a name, triples, or a table by shape.
        ns_steps: Number of these steps.
        ns_dtype: Type of these steps; `None` for the parameter's, `"auto"` for the fastest.
        adjust_lr: Factor on the learning rate by shape.
        eps: Added to the Frobenius norm.
    """

    clip_quantile: float | None
    clip_sample: int | None
    coefficients: Coefficients
    ns_steps: int
    ns_dtype: DtypeChoice
    adjust_lr: AdjustLR | None
    eps: float


def root_update(
    update: Tensor,
    *,
    clip_quantile: float | None = 0.9,
    clip_sample: int | None = None,
    coefficients: Coefficients = "root",
    ns_steps: int = 5,
    ns_dtype: DtypeChoice = None,
    eps: float = 1e-7,
) -> Tensor:
    """Clip matrices at a quantile of their absolute values, then push their singular values towards one.

    Args:
        update: Shape `(..., m, n)`, floating point.
        clip_quantile: As `q` in `clip_outliers`; `None` does not clip.
        clip_sample: As `sample` there.
        coefficients: As `newton_schulz` takes them, or a table: sides of a matrix -> `(a, b, c)` triples.
            Shapes that a table does not hold take those of the nearest aspect ratio.
        ns_steps: Number of Newton-Schulz steps.
        ns_dtype: Type of the Newton-Schulz steps, as `dtype` in `newton_schulz`. `None`: that of `update`.
        eps: Added to the Frobenius norm.

    Returns:
        A new tensor of the shape and dtype of `update`; zero for a zero matrix, NaN for one with NaN.

    Raises:
        ValueError: As `clip_outliers` and `newton_schulz` do.

    Complexity:
        `ns_steps` times `4·m²·n + 2·m³` flops a matrix at most, m ≤ n; clipping is linear.

    References:
        ROOT: Robust Orthogonalized Optimizer for Neural Network Training, arXiv 2511.20626.

    Example:
        >>> import torch
        >>> U = torch.eye(2, 3) + 0.01
        >>> root_update(U, clip_quantile=None, coefficients="polar_express").round(decimals=1) + 0.0
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    clipped = _clipped(update, clip_quantile, clip_sample)
    return newton_schulz(clipped, _chosen(coefficients, ns_steps), ns_steps, eps=eps, dtype=ns_dtype)


def _clipped(update: Tensor, quantile: float | None, sample: int | None) -> Tensor:
    if quantile is None or quantile == 1:
        return update
    return clip_outliers(update, quantile, eps=_QUANTILE_EPS, sample=sample)


def _chosen(coefficients: Coefficients, steps: int) -> str | Triples | CoefficientSet:
    return _table(coefficients, steps) if isinstance(coefficients, Mapping) else coefficients


def _table(coefficients: Mapping[tuple[int, int], Triples], steps: int) -> CoefficientSet:
    by_shape = tuple(
        ((min(sides), max(sides)), resolve_coefficients(triples).triples)
        for sides, triples in coefficients.items()
    )
    return CoefficientSet(by_shape[0][1], steps, by_shape=by_shape)


class ROOT(MatrixOptimizer):
    r"""ROOT: Robust Orthogonalized Optimizer for Neural Network Training (arXiv 2511.20626).

    Muon with two changes, each of which can be had without the other: entries of the momentum beyond a
    quantile of their absolute values are clipped before it is orthogonalised (what is clipped stays in
    the buffer), and the coefficients of the Newton-Schulz steps depend on the shape of the matrix. With
    buffer M, gradient G and U the (Nesterov) momentum, as in `MatrixOptimizer`:

    .. math::
        B = \operatorname{clamp}(U, -\epsilon_q, \epsilon_q), \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\, s\, \mathrm{NS}_K(B)

    `clip_quantile=None, coefficients="muon"` is Muon.

    What to expect. Clipping at 0.9 is no removal of outliers alone: one entry in ten is always clipped, and
    of Gaussian entries 17 % of the energy goes. An outlier disturbs Muon only as far as it carries a
    visible share of the Frobenius norm. Coefficients bring singular values nearer to one; that need not
    lower a loss.

    Differences from the official code: the buffer is a moving average, not a sum (equal after normalisation); the
    AdamW for the other parameters is PyTorch's; kernels are flattened to matrices.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either. Groups may set `RootOptions`
            of their own.
        lr: Learning rate. Default 1e-3, as in the official code.
        weight_decay: Decoupled weight decay. Default 0.1, as there.
        momentum: Decay of the moving average, in [0, 1). Default 0.95.
        nesterov: Look ahead by one step. Default True, as in the official code; the paper has none.
        clip_quantile: Quantile in (0, 1] of the absolute values at which entries are clipped. Default 0.9;
            ``None`` or 1 clips nothing.
        clip_sample: Estimate that quantile from so many entries of each matrix; on a CPU with many cores it
            is the part of a step that they do not share. Default None: all. See `clip_outliers`.
        coefficients: Of the Newton-Schulz steps: a name out of `COEFFICIENTS`, ``(a, b, c)`` triples, or a
            table ``{(rows, columns): triples}``, such as ``{(m, n): fit_newton_schulz((m, n)).triples}``,
            where a shape that it does not hold takes those of the nearest aspect ratio. Default
            ``"root"``: the published table.
        ns_steps: Newton-Schulz steps. Default 5.
        ns_dtype: Type of these steps. Default None: the parameter's. ``"auto"``: bfloat16 where the device has it
            natively, else float32. `torch.bfloat16`, which `torch.optim.Muon` always uses, takes several times as long where
            it is emulated.
        adjust_lr: ``"match_rms_adamw"`` (default): s = 0.2·√max(m, n), so that AdamW's learning rates
            carry over. ``"original"``: s = √max(1, m/n). None: s = 1.
        eps: Added to the Frobenius norm. Default 1e-7.
        apply_to: ``"matrices"`` (default): vectors move by AdamW, and embeddings and heads too if names are given.
            ``"all"`` is refused if there are vectors.
        adamw: Options of that AdamW; see `AdamWOptions`.
        maximize: Ascend. Default False.
        foreach: Move many tensors with one kernel. Default None: on accelerators.
        **options: ``stacked``, ``split`` and ``nonfinite``; see `MatrixOptions`. Clipping hides an infinite entry from
            the update, not from the buffer.

    Raises:
        TypeError: For modules, complex or integer parameters, sparse gradients.
        ValueError: For options out of range, and for vectors in a group with ``use_matrix_rule=True``.

    Complexity:
        `ns_steps` times `4·m²·n + 2·m³` flops for an m×n matrix at most, m ≤ n; clipping is linear. One
        buffer of state per parameter: half of AdamW's.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = ROOT(model.named_parameters(), lr=1e-3, adamw={"lr": 1e-3})
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> [group["use_matrix_rule"] for group in optimizer.param_groups]
        [True, False]
    """

    takes_vectors = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        clip_quantile: float | None = 0.9,
        clip_sample: int | None = None,
        coefficients: Coefficients = "root",
        ns_steps: int = 5,
        ns_dtype: DtypeChoice = None,
        adjust_lr: AdjustLR | None = "match_rms_adamw",
        eps: float = 1e-7,
        apply_to: ApplyTo = "matrices",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        own: RootOptions = {
            "clip_quantile": clip_quantile,
            "clip_sample": clip_sample,
            "coefficients": coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr": adjust_lr,
            "eps": eps,
        }
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            **own,
        }
        super().__init__(params, defaults, apply_to=apply_to, adamw=adamw, **options)

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range."""
        super().check_group(group)
        if group["clip_quantile"] is not None:
            check_quantile(group["clip_quantile"], "clip_quantile")
        if group["clip_sample"] is not None and group["clip_sample"] < 1:
            raise ValueError(f"clip_sample must be at least 1, or None for all, got {group['clip_sample']}")
        check_adjust_lr(group["adjust_lr"])
        check_dtype(group["ns_dtype"], "ns_dtype")
        if not (isinstance(group["ns_steps"], int) and group["ns_steps"] >= 1):
            raise ValueError(f"ns_steps must be an integer of at least 1, got {group['ns_steps']!r}")
        if not group["eps"] > 0:
            raise ValueError(f"eps must be above 0, got {group['eps']}")
        _check_coefficients(group["coefficients"], group["ns_steps"])

    def batches_equal_shapes(self, group: Group) -> bool:
        """Newton-Schulz takes stacks."""
        return True

    def stacking_shape(self, shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
        """Tall matrices go with wide ones, transposed, and small ones with those of nearly their shape, padded."""
        return common_shape(shape) if min(shape) < _PADDED_BELOW else (min(shape), max(shape))

    def directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """Transpose the tall ones, stack, and transpose back."""
        tall = [update.size(-2) > update.size(-1) for update in updates]
        wide = [u.mT if turn else u for u, turn in zip(updates, tall, strict=True)]
        if len({u.shape for u in wide}) == 1:
            made = cast(Sequence[Tensor], super().directions(wide, states, group).tensors)
        else:
            # Zeros would take part in the quantile, so that clipping comes before padding.
            made = newton_schulz_foreach(
                [_clipped(u, group["clip_quantile"], group["clip_sample"]) for u in wide],
                _chosen(group["coefficients"], group["ns_steps"]),
                group["ns_steps"],
                eps=group["eps"],
                dtype=group["ns_dtype"],
            )
        return Directions([t.mT if turn else t for t, turn in zip(made, tall, strict=True)])

    def direction(self, update: Tensor, group: Group) -> Tensor:
        """Clip and orthogonalise."""
        return root_update(
            update,
            clip_quantile=group["clip_quantile"],
            clip_sample=group["clip_sample"],
            coefficients=group["coefficients"],
            ns_steps=group["ns_steps"],
            ns_dtype=group["ns_dtype"],
            eps=group["eps"],
        )

    def lr_factor(self, shape: Sequence[int], group: Group) -> float:
        """Factor on the learning rate: see `adjust_lr`."""
        return lr_factor(shape, group["adjust_lr"])


def _check_coefficients(coefficients: Coefficients, steps: int) -> None:
    if isinstance(coefficients, CoefficientSet):
        raise TypeError(
            "coefficients must be a name, (a, b, c) triples or a table of them, which a state dict can hold; "
            "got a CoefficientSet, give its triples"
        )
    if not isinstance(coefficients, Mapping):
        resolve_coefficients(coefficients).schedule(steps)
        return
    if not coefficients:
        raise ValueError("a table of coefficients must hold at least one shape, got an empty one")
    for sides, triples in coefficients.items():
        if not (
            isinstance(sides, tuple) and len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)
        ):
            raise ValueError(
                f"a table of coefficients is keyed by (rows, columns) of a matrix, got {sides!r}"
            )
        resolve_coefficients(triples).schedule(steps)
