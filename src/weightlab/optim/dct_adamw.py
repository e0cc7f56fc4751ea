"""AdamW with moments kept in a few columns of a cosine basis, chosen anew from the gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_step
from torch.optim.optimizer import ParamsT

from weightlab.linalg.column_selection import (
    Basis,
    Norm,
    basis_vectors,
    carry_columns,
    check_basis,
    check_norm,
    check_rank,
    project_tall,
    resolve_rank,
    select_tall,
)
from weightlab.linalg.cosine_transform import Transform, uses_fft
from weightlab.optim.matrix_optimizer import (
    AdamWOptions,
    ApplyTo,
    Directions,
    Group,
    LowRank,
    MatrixOptimizer,
    MatrixOptions,
)
from weightlab.optim.quantized_buffer import Storage, check_storage, decode, encode

Frame = Basis | Literal["svd"]
State = dict[str, Any]

# On a CPU, matrices of more entries go one at a time: stacking would cost more than the calls it saves.
_STACKED_ENTRIES = 2**15
_ERROR = "error_feedback_"


class DCTAdamW(MatrixOptimizer):
    r"""SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (arXiv 2505.17967).

    AdamW whose moments live in r of the n dimensions of a matrix's shorter side. The r dimensions are
    columns of one orthogonal matrix Q per size, the cosine basis, those with which the gradient is best
    aligned; only their indices are kept. For G of shape m×n, m ≥ n (wide matrices as their transposes):

    .. math::
        I = \text{top-}r\ \lVert (G Q)_{:,j} \rVert_p, \quad g = G Q_{:,I}, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\, \mathrm{Adam}(g)\, Q_{:,I}^\top

    What lies outside of the r columns is dropped, unless `error_feedback` keeps it for the next step. When
    the columns change, those that stay keep their moments, and new ones start from zero. With r = n it is
    AdamW in a rotated basis. On the quality of the basis: cosines beat random directions where a
    matrix is smooth along the transformed side. Hidden units have no order, and there they cannot.

    Differences from the official code: one basis for both transforms and for every size; moments are
    carried over exactly (in the official code, a product that overwrites its own input clears them on a
    CPU); the error feedback is decoded in the order it was encoded in, with all 255 levels for 8 bits, and a
    constant row does not give NaN; the gradient is left as it is; columns are kept in ascending order.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: Learning rate. Default 1e-3.
        betas: Decay rates of the two moments. Default (0.9, 0.999).
        eps: Added to the root of the second moment. Default 1e-8.
        weight_decay: Decoupled weight decay. Default 0.
        rank: r, or a fraction of the shorter side in (0, 1]. At most n columns are used. Default 128.
        update_gap: The columns are chosen at the first step and at every step that is a multiple of it;
            between, one product of 2·m·n·r flops projects. Default 1.
        basis: ``"dct2"`` (default) or ``"dct3"``; the official code has the latter for products and the former for
            FFTs. Controls: ``"random"``, a fixed rotation; ``"identity"``, coordinates; ``"svd"``, the gradient's own
            right singular vectors as in GaLore, kept as an r×n matrix, with moments rotated into the new ones.
        transform: ``"matmul"``, ``"fft"``, or ``"auto"`` (default): by size.
        select_norm: p, 1 (default, as in the official code) or 2, which leaves the least error.
        transport: Carry moments over to the new columns. Default True. Without, they stay where they are,
            and belong to other columns from then on, as in the official code's default.
        error_feedback: Keep what was dropped and add it to the next gradient: ``"fp32"``, or quantised by row
            in ``"int8"`` or ``"int4"``. Default None.
        max_dim: Matrices with a side of this size or more are moved by plain AdamW, and so are vectors that
            the rule is given. Default 32000.
        apply_to: As in `MatrixOptimizer`. Default ``"matrices"``: vectors, embeddings and heads move by AdamW.
        adamw: Options of that AdamW; see `AdamWOptions`. What is not given is as above.
        maximize: Ascend. Default False.
        foreach: Move the moments of many matrices with one kernel. Default None: on accelerators.
        **options: ``stacked``, ``split`` and ``nonfinite``; see `MatrixOptions`.

    Raises:
        TypeError: For modules, complex or integer parameters, sparse gradients.
        ValueError: For options out of range.

    Complexity:
        About 2.5·m·n·log₂(n) flops for choosing, by FFT, and 2·m·n·r for the update. State: 2·m·r numbers (at
        least float32) and r indices, against AdamW's 2·m·n, and for error feedback m·n numbers, bytes or half-bytes.
        Once for all matrices of one shorter side below 4096: n² numbers.

    Example:
        >>> layer = torch.nn.Linear(8, 16, bias=False)
        >>> optimizer = DCTAdamW(layer.parameters(), rank=2)
        >>> layer(torch.ones(8)).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[layer.weight].items()}
        {'step': (), 'indices': (2,), 'low_exp_avg': (16, 2), 'low_exp_avg_sq': (16, 2)}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        update_gap: int = 1,
        basis: Frame = "dct2",
        transform: Transform = "auto",
        select_norm: Norm = 1,
        transport: bool = True,
        error_feedback: Storage | None = None,
        max_dim: int = 32000,
        apply_to: ApplyTo = "matrices",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_gap": update_gap,
            "basis": basis,
            "transform": transform,
            "select_norm": select_norm,
            "transport": transport,
            "error_feedback": error_feedback,
            "max_dim": max_dim,
            "maximize": maximize,
            "foreach": foreach,
        }
        _check_moments(betas, eps)
        own: AdamWOptions = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, apply_to=apply_to, adamw={**own, **(adamw or {})}, **options)

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range."""
        super().check_group(group)
        _check_moments(group["betas"], group["eps"])
        check_rank(group["rank"])
        if group["basis"] != "svd":
            check_basis(group["basis"])
        uses_fft(1, group["transform"])
        check_norm(group["select_norm"])
        check_storage(group["error_feedback"])
        if not isinstance(group["update_gap"], int) or group["update_gap"] < 1:
            raise ValueError(
                f"update_gap must be a whole number of steps, at least 1, got {group['update_gap']!r}"
            )
        if not group["max_dim"] >= 1:
            raise ValueError(f"max_dim must be at least 1, got {group['max_dim']}")

    def batches_equal_shapes(self, group: Group) -> bool:
        """Transform equal shapes together."""
        return True

    def stacking_shape(self, shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
        """Wide matrices go with the tall ones that they are transposes of."""
        return tuple(sorted(shape, reverse=True)) if len(shape) == 2 else shape

    def directions(self, updates: Sequence[Tensor], states: Sequence[State], group: Group) -> Directions:
        """Project, step Adam on what is left, and give back factors of the update."""
        shape = updates[0].shape
        for state in states:
            if "step" not in state:
                state["step"] = torch.zeros(())
        if len(shape) != 2 or 0 in shape or max(shape) >= group["max_dim"]:
            return Directions(_adam(updates, states, group, prefix=""))

        lows: list[Tensor] = [updates[0]] * len(updates)
        vectors = list(lows)
        for chosen, first, refresh in _together(updates, states, group["update_gap"]):
            X = _stacked([tall(updates[i]) for i in chosen])
            chosen_states = [states[i] for i in chosen]
            low, rows = _project(X, chosen_states, group, first, refresh)
            for i, one_low, one_rows in zip(chosen, _parts(low), _parts(rows), strict=True):
                lows[i], vectors[i] = one_low, one_rows
        steps = _adam(lows, states, group, prefix="low_")
        return Directions([low_rank_direction(*parts) for parts in zip(updates, steps, vectors, strict=True)])


def _check_moments(betas: Sequence[float], eps: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _together(
    updates: Sequence[Tensor], states: Sequence[State], gap: int
) -> Iterator[tuple[list[int], bool, bool]]:
    """Which updates to treat in one go, whether it is their first step, whether to choose columns."""
    groups: dict[tuple[bool, bool, int], list[int]] = {}
    large = updates[0].device.type == "cpu" and updates[0].numel() > _STACKED_ENTRIES
    for i, state in enumerate(states):
        step = int(state["step"].item()) + 1
        groups.setdefault((step == 1, step == 1 or step % gap == 0, large * i), []).append(i)
    for (first, refresh, _), chosen in groups.items():
        yield chosen, first, refresh


def _project(
    X: Tensor, states: Sequence[State], group: Group, first: bool, refresh: bool
) -> tuple[Tensor, Tensor]:
    """Return coefficients `(..., m, r)` and basis vectors `(..., r, n)`; keep frame and dropped part."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    n = X.shape[-1]
    storage: Storage | None = group["error_feedback"]
    if storage is not None and not first:
        X = X + _stacked([decode(_kept_error(state), n) for state in states])
    if group["basis"] == "svd":
        low, rows = _by_svd(X, states, group, first, refresh)
    else:
        low, rows = _by_columns(X, states, group, first, refresh)
    if storage is not None:
        dropped = encode(X - low @ rows, storage)
        for i, state in enumerate(states):
            for name, value in dropped.items():
                state[_ERROR + name] = value if value.ndim == 2 else value[i].clone()
    return low, rows


def _kept_error(state: State) -> dict[str, Tensor]:
    return {name.removeprefix(_ERROR): value for name, value in state.items() if name.startswith(_ERROR)}


def _by_columns(
    X: Tensor, states: Sequence[State], group: Group, first: bool, refresh: bool
) -> tuple[Tensor, Tensor]:
    n, basis = X.shape[-1], group["basis"]
    if not refresh:
        rows = basis_vectors(_stacked([state["indices"] for state in states]), n, basis, X.dtype)
        return project_tall(X, rows), rows
    low, indices = select_tall(X, group["rank"], basis, group["select_norm"], group["transform"])
    if not first and group["transport"]:
        previous = _stacked([state["indices"] for state in states])
        names = ("low_exp_avg", "low_exp_avg_sq")
        moments = [_stacked([state[name] for state in states]) for name in names]
        for name, carried in zip(names, carry_columns(moments, previous, indices), strict=True):
            _replace(states, name, carried)
    _replace(states, "indices", indices)
    return low, basis_vectors(indices, n, basis, X.dtype)


def _by_svd(
    X: Tensor, states: Sequence[State], group: Group, first: bool, refresh: bool
) -> tuple[Tensor, Tensor]:
    if not refresh:
        rows = _stacked([state["vectors"] for state in states])
        return project_tall(X, rows), rows
    rank = resolve_rank(group["rank"], X.shape[-1])
    # LAPACK refuses NaN; the projection of X itself carries it on.
    rows = torch.linalg.svd(X.nan_to_num(0.0, 0.0, 0.0), full_matrices=False).Vh[..., :rank, :].contiguous()
    if not first and group["transport"]:
        rotation = _stacked([state["vectors"] for state in states]) @ rows.mT
        # Squares keep second moments positive; for a permutation both are the same.
        for name, turn in (("low_exp_avg", rotation), ("low_exp_avg_sq", rotation.square())):
            _replace(states, name, _stacked([s[name] for s in states]) @ turn)
    _replace(states, "vectors", rows)
    return project_tall(X, rows), rows


def _adam(grads: Sequence[Tensor], states: Sequence[State], group: Group, prefix: str) -> list[Tensor]:
    """Adam's steps at learning rate one, by PyTorch's own AdamW."""
    for grad, state in zip(grads, states, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            if prefix + name not in state:
                state[prefix + name] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
    # At a learning rate of −1, weights that start from zero end as the step.
    steps = [torch.zeros_like(grad, memory_format=torch.contiguous_format) for grad in grads]
    fused = steps[0].device.type == "cpu" and type(grads[0]) in (Tensor, nn.Parameter)
    beta1, beta2 = group["betas"]
    adamw_step(
        steps,
        list(grads),
        [state[prefix + "exp_avg"] for state in states],
        [state[prefix + "exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=None if fused else group["foreach"],
        fused=fused or None,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=-1.0,
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )
    return steps


def tall(matrix: Tensor) -> Tensor:
    """Return the matrix, or its transpose if that has more rows."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def low_rank_direction(update: Tensor, low: Tensor, vectors: Tensor) -> LowRank:
    """Coefficients `(m, r)` and basis vectors `(r, n)` of `tall(update)` as a direction of the update's shape."""
    return LowRank(low, vectors) if update.shape[0] >= update.shape[1] else LowRank(vectors.mT, low.mT)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor] if tensor.ndim == 2 else tensor.unbind()


def _replace(states: Sequence[State], name: str, values: Tensor) -> None:
    """Give each state its own tensor: a view of a stack would be saved with the whole stack."""
    if len(states) == 1:
        states[0][name] = values
        return
    for state, value in zip(states, values.unbind(), strict=True):
        state[name] = value.clone()
