"""ARO: a simple update rule in a rotated frame that is chosen for that rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightlab.linalg import eigenbasis, polar_factor, qr_factor, sinkhorn_normalize
from weightlab.linalg.orthogonal_factor import QRBackend
from weightlab.optim.lr_scaling import matrix_shape
from weightlab.optim.matrix_optimizer import (
    AdamWOptions,
    ApplyTo,
    Directions,
    Group,
    MatrixOptimizer,
    MatrixOptions,
)

BaseRule = Callable[[Tensor], Tensor]
BaseName = Literal["sinkhorn", "sign", "row_norm", "adam"]
Policy = Literal["qr", "polar", "eigen", "none"]
Side = Literal["auto", "left", "right"]

# Rotations change nothing for these, so there is nothing for ARO to choose.
_EQUIVARIANT = {"muon", "newton_schulz", "polar", "orthogonal", "msign", "sgd", "normalized_sgd"}
_FLOOR = 1e-30


def row_normalize(X: Tensor) -> Tensor:
    """Divide each row by its root mean square; rows of zeros stay zero.

    Args:
        X: Shape `(..., m, n)`, floating point.

    Returns:
        A new tensor of that shape and dtype; rows have norm √n.

    Example:
        >>> row_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).square().mean(-1).round(decimals=4)
        tensor([1., 0.])
    """
    norms = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return X * (math.sqrt(X.size(-1)) / norms.clamp_min(_FLOOR))


def aro_rotation(
    M: Tensor, R: Tensor, f: BaseRule, *, policy: Policy = "qr", qr: QRBackend = "householder"
) -> Tensor:
    r"""Rotation for the rows of M under the base rule f, given the one before.

    With :math:`A = M f(R^\top M)^\top`, which aligns :math:`R\,f(R_-^\top M)` with M as far as possible if R is
    its polar factor:

    - `"qr"`: Q of A's QR decomposition, with a positive diagonal: the paper's choice;
    - `"polar"`: the polar factor of A: `aro_alignment` does not decrease on constant M if f is the gradient of
      a norm (sign, row norm), as it may for `"qr"`;
    - `"eigen"`: eigenvectors of :math:`M M^\top`, whatever f is;
    - `"none"`: R.

    Where M is rank-deficient the remaining columns of R are arbitrary; `aro_direction` gives them no weight. M = 0
    returns R. The condition number of A is about the square of M's. Householder's reflections bear that, since
    in A the frame's weak directions are weak throughout. Cholesky's Gram matrices do not: with them A, scaled to
    norm 1, gets :math:`100\,\epsilon R` added, ε being the unit of rounding, so that directions of M below about 3e-3
    of the strongest follow the old frame in float32. Fixed points are not moved by that: where :math:`A = R T`
    with a triangle T, what is added only changes T.

    Args:
        M: Shape `(..., k, n)`, float32 or float64. The leading dimensions are a batch.
        R: Shape `(..., k, k)`, orthogonal. The identity at first.
        f: Base rule: takes `(..., k, n)`, returns that shape.
        policy: As above.
        qr: Backend of `"qr"`; see `qr_factor`. Where `"cholesky"` fails, a CPU takes Householder's Q, and an
            accelerator R, for which it need not wait for the host.

    Returns:
        A new orthogonal tensor of the shape of R.

    Raises:
        ValueError: If policy or backend are unknown.

    Complexity:
        `4·k²·n` flops, the base rule's, and about `3·k³` for QR.

    References:
        ARO: A New Lens On Matrix Optimization For Large Models, arXiv 2602.09006.

    Example:
        >>> M = torch.tensor([[3.0, 4.0], [4.0, 3.0]])
        >>> aro_rotation(M, torch.eye(2), torch.sign, policy="eigen").abs().round(decimals=4)
        tensor([[0.7071, 0.7071],
                [0.7071, 0.7071]])
    """
    return _next_rotation([M], R, [f], policy, qr)


def aro_direction(M: Tensor, R: Tensor, f: BaseRule) -> Tensor:
    r"""The base rule in the rotated frame, :math:`R\,f(R^\top M)`.

    Rows of :math:`R^\top M` that are rounding errors next to the longest (shorter by `8·ε·√k`) count as
    zero; base rules would make them as long as any other.

    Args:
        M: Shape `(..., k, n)`.
        R: Shape `(..., k, k)`, orthogonal.
        f: Base rule: takes `(..., k, n)`, returns that shape.

    Complexity:
        `4·k²·n` flops and the base rule's.

    Example:
        >>> half = 0.5**0.5
        >>> aro_direction(torch.tensor([[3.0], [1.0]]), torch.tensor([[half, -half], [half, half]]), torch.sign)
        tensor([[1.4142],
                [0.0000]])
    """
    return R @ f(_rotated(M, R))


def aro_alignment(M: Tensor, R: Tensor, f: BaseRule) -> Tensor:
    r"""J: how fast the loss falls along `aro_direction`, :math:`\langle M, R f(R^\top M) \rangle / \lVert M \rVert_F`.

    Args:
        M: Shape `(..., k, n)`; the gradient or momentum.
        R: Shape `(..., k, k)`, orthogonal.
        f: Base rule.

    Returns:
        Shape `(...)`; 0 for M = 0.

    Example:
        >>> aro_alignment(torch.tensor([[3.0, -4.0]]), torch.eye(1), torch.sign)
        tensor(1.4000)
    """
    Z = _rotated(M, R)
    norm = torch.linalg.vector_norm(M, dim=(-2, -1))
    return (Z * f(Z)).sum((-2, -1)) / norm.clamp_min(_FLOOR)


def _rotated(M: Tensor, R: Tensor) -> Tensor:
    """`RᵀM` with zeros for rows that rounding errors fill."""
    Z = R.mT @ M
    rows = torch.linalg.vector_norm(Z, dim=-1, keepdim=True)
    noise = 8 * torch.finfo(Z.dtype).eps * math.sqrt(Z.size(-2)) * rows.amax(-2, keepdim=True)
    return Z * ~(rows <= noise)  # NaN stays


def _next_rotation(
    Ms: Sequence[Tensor], R: Tensor, fs: Sequence[BaseRule], policy: Policy, qr: QRBackend
) -> Tensor:
    """`aro_rotation` for several matrices that share a rotation: their A's and Gram matrices are summed."""
    if policy == "none":
        return R.clone()
    if policy == "eigen":
        gram = _total([M @ M.mT for M in Ms])
        moved = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] > 0
        return torch.where(moved, eigenbasis(gram), R)
    if policy not in ("qr", "polar"):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, got {policy!r}")
    A = _total([M @ f(_rotated(M, R)).mT for M, f in zip(Ms, fs, strict=True)])
    norm = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)
    if policy == "polar":
        new = polar_factor(A)
    elif qr == "householder":
        new = qr_factor(A)
    else:
        A = A / norm.clamp_min(_FLOOR) + 100 * torch.finfo(A.dtype).eps * R
        new = qr_factor(A, qr, fallback=None if A.device.type == "cpu" else R)
    return torch.where(norm > 0, new, R)


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _adam_rule(Z: Tensor, V: Tensor, beta2: float) -> Tensor:
    """Adam's direction with the second moment V taken one step ahead, which is not kept."""
    return Z * V.lerp(Z.square(), 1 - beta2).clamp_min(torch.finfo(V.dtype).tiny).rsqrt()


class ARO(MatrixOptimizer):
    r"""ARO: A New Lens On Matrix Optimization For Large Models (arXiv 2602.09006).

    A simple base rule f acts on the momentum M in a frame that turns with the training:

    .. math::
        M \leftarrow \beta M + (1 - \beta) G, \quad
        R \leftarrow Q\text{ of the QR decomposition of } M f(R^\top M)^\top, \quad
        U = R f(R^\top M), \quad
        W \leftarrow (1 - \eta\lambda) W - \eta \cdot 0.2\, U / \mathrm{rms}(U)

    R is orthogonal and acts on the rows, or on the columns where that is the smaller side. With
    ``base="row_norm"`` on a constant gradient that is orthogonal iteration, and U goes to
    :math:`\sqrt n\, U V^\top`, Muon's direction. The update's root mean square is that of AdamW's, so that AdamW's
    learning rates carry over.

    What the paper's aim, the fastest decrease of the loss under f, would ask for is ``policy="polar"``. The QR
    it prefers as more robust to noise may lower that rate, and drifts to the eigenvectors of :math:`M M^\top`.

    Differences from the published algorithm: rounding errors count as zero (see `aro_direction`), so that
    rank-deficient momenta do not make arbitrary directions. Zero momentum moves nothing. The paper's rotations have determinant 1; here the
    diagonal of QR's triangle is positive instead, which changes no update, since base rules keep signs.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: Learning rate. Default 1e-3.
        momentum: Decay β of the moving average, in [0, 1). Default 0.95.
        weight_decay: Decoupled weight decay. Default 0.1.
        base: ``"sinkhorn"`` (default): `sinkhorn_normalize`. ``"sign"``. ``"row_norm"``: `row_normalize`.
            ``"adam"``: divides by the root of a second moment, which lives in the rotated frame and is not turned
            with it. A function ``(batch, k, n) -> (batch, k, n)``, which treats matrices apart and should
            keep signs; saved states do not hold it. Rules that a rotation does not change, such as
            orthogonalisation, are refused by name.
        sinkhorn_iters: Iterations of ``"sinkhorn"``. Default 5.
        policy: How the frame is chosen: ``"qr"`` (default), ``"polar"``, ``"eigen"``, ``"none"``; see `aro_rotation`.
        qr: ``"householder"`` (default; the quicker one on a CPU) or ``"cholesky"`` (on accelerators).
        rms: Root mean square that each matrix's update is brought to. Default 0.2. None leaves U as it is.
        side: Side that the frame acts on: ``"auto"`` (default): the smaller one, rows of square matrices;
            ``"left"``: rows, ``"right"``: columns. In a group, a list may name one of the latter two for each parameter.
        share_rotation: Option of groups: one frame for all parameters of the group, which then must agree in the size
            of the side that it acts on (with ``side="auto"``, in any side). A is summed over them. The paper shares one
            for each block of a transformer, acting on the side of the residual stream: that is
            ``"left"`` for what writes to it (attention output, down projection) and ``"right"`` for what
            reads from it (query, key, value, gate, up). Default False.
        rotation_every: The frame turns at every so many steps. Default 1. At 5, a step takes half the time.
        betas: For ``base="adam"``, decay of the momentum (instead of `momentum`) and of the second
            moment. Default None: `momentum` and 0.95.
        nesterov: Look ahead by one step. Default False.
        apply_to: ``"matrices"`` (default): vectors, and embeddings and heads told by their names, move by AdamW.
            ``"all"``: every parameter goes by the rule, which refuses vectors.
        adamw: Options of that AdamW; see `AdamWOptions`.
        maximize: Ascend. Default False.
        foreach: Multi-tensor kernels for AdamW. Default None: as PyTorch decides.
        **options: ``stacked``, ``split`` and ``nonfinite``; see `MatrixOptions`.

    Raises:
        TypeError: For modules, complex or integer parameters, sparse gradients; a base that is neither name nor
            function.
        ValueError: For options out of range; parameters with fewer than two dimensions under the rule; groups that
            share a rotation but not a side; a base that returns another shape.

    Complexity:
        With k the rotated and n the other side, `8·k²·n` flops, and about `3·k³` for QR; Muon takes
        `20·k²·n + 10·k³`. Without turning, `4·k²·n`. State: the momentum, in the parameter's dtype; the frame, k² numbers in
        float32 (float64 for float64; none with ``policy="none"``); k·n more with ``base="adam"``. All arithmetic is in
        float32 at least.

    Example:
        >>> model = torch.nn.Linear(6, 4)
        >>> optimizer = ARO(model.named_parameters(), lr=0.01, weight_decay=0.0)
        >>> before = model.weight.detach().clone()
        >>> model(torch.randn(8, 6)).square().sum().backward()
        >>> optimizer.step()
        >>> (model.weight.detach() - before).square().mean().sqrt().round(decimals=5)  # lr · 0.2
        tensor(0.0020)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        base: BaseName | BaseRule = "sinkhorn",
        sinkhorn_iters: int = 5,
        policy: Policy = "qr",
        qr: QRBackend = "householder",
        rms: float | None = 0.2,
        side: Side = "auto",
        share_rotation: bool = False,
        rotation_every: int = 1,
        betas: tuple[float, float] | None = None,
        nesterov: bool = False,
        apply_to: ApplyTo = "matrices",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        if not (isinstance(base, str) or callable(base)):
            raise TypeError(f"base must be a name or a function, got {type(base).__name__} {base!r}")
        if betas is not None and base != "adam":
            raise ValueError(f'betas are those of base="adam", got base={base!r}; set momentum')
        self._own_base = None if isinstance(base, str) else base
        beta1, beta2 = (momentum, 0.95) if betas is None else betas
        defaults = {
            "lr": lr,
            "momentum": beta1,
            "weight_decay": weight_decay,
            "base": base if isinstance(base, str) else "own",
            "sinkhorn_iters": sinkhorn_iters,
            "policy": policy,
            "qr": qr,
            "rms": rms,
            "side": side,
            "share_rotation": share_rotation,
            "rotation_every": rotation_every,
            "beta2": beta2,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, apply_to=apply_to, adamw=adamw, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own_base": self._own_base}

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range, and for parameters that the rule cannot take."""
        super().check_group(group)
        _check_base(group["base"], self._own_base)
        for option, known in (("policy", get_args(Policy)), ("qr", get_args(QRBackend))):
            if group[option] not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {group[option]!r}")
        for option in ("sinkhorn_iters", "rotation_every"):
            if not (isinstance(group[option], int) and group[option] >= 1):
                raise ValueError(f"{option} must be an integer of at least 1, got {group[option]!r}")
        if group["rms"] is not None and not group["rms"] > 0:
            raise ValueError(f"rms must be above 0, or None to leave updates as they are, got {group['rms']}")
        if not 0 <= group["beta2"] < 1:
            raise ValueError(f"the second of betas must be in [0, 1), got {group['beta2']}")
        if group.get("use_matrix_rule") is not False:
            params = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
            for p in params:
                if p.ndim < 2:
                    raise ValueError(
                        f"ARO's rule takes matrices, got a parameter of shape {tuple(p.shape)}; leave it to AdamW "
                        '(apply_to="matrices", or a group with use_matrix_rule=False)'
                    )
            _check_sides(params, group)

    def batches_equal_shapes(self, group: Group) -> bool:
        """Products and decompositions take stacks."""
        return not group["share_rotation"]

    def keeps_group_together(self, group: Group) -> bool:
        """A frame that is shared is one for all."""
        return bool(group["share_rotation"])

    def _batches(self, group: Group, params: list[Tensor]) -> list[list[Tensor]]:
        return [params] if group["share_rotation"] else super()._batches(group, params)

    def directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """Turn the frames if it is time, and apply the base rule in them."""
        if not any(update.numel() for update in updates):
            return Directions(updates)
        sides = self._sides(updates, states, group)
        if group["share_rotation"]:
            moved = self._move_frame([[u] for u in updates], [[s] for s in states], sides, group)
            return Directions([stack[0] for stack in moved])
        directions = list(updates)
        for side in dict.fromkeys(sides):
            chosen = [i for i, s in enumerate(sides) if s == side]
            moved = self._move_frame(
                [[updates[i] for i in chosen]], [[states[i] for i in chosen]], [side], group
            )
            for i, direction in zip(chosen, moved[0].unbind(), strict=True):
                directions[i] = direction
        return Directions(directions)

    def _sides(self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group) -> list[str]:
        if not group["share_rotation"] and isinstance(group["side"], str):
            return _matrix_sides([(u.size(0), u.size(1)) for u in updates], group)
        params = group["params"]
        sides = _matrix_sides([matrix_shape(p.shape) for p in params], group)
        by_state = {id(self.state[p]): side for p, side in zip(params, sides, strict=True)}
        return [by_state[id(state)] for state in states]

    def _move_frame(
        self,
        updates: Sequence[Sequence[Tensor]],
        states: Sequence[Sequence[dict[str, Any]]],
        sides: Sequence[str],
        group: Group,
    ) -> list[Tensor]:
        """Directions for stacks of equal matrices; all stacks have the same stack of rotations."""
        stacks = [_stack(us) for us in updates]
        Ms = [M if side == "left" else M.mT for M, side in zip(stacks, sides, strict=True)]
        adam = group["base"] == "adam"
        moments = [_second_moments(M, s) if adam else None for M, s in zip(Ms, states, strict=True)]
        fs = [self._base_rule(V, group) for V in moments]
        R = None if group["policy"] == "none" else _rotations(Ms, states, fs, group)
        directions = []
        for M, f, V, side, owners in zip(Ms, fs, moments, sides, states, strict=True):
            Z = M if R is None else _rotated(M, R)
            U = _same_shape(f(Z), Z)
            if V is not None:
                for state, moment in zip(owners, V.lerp(Z.square(), 1 - group["beta2"]), strict=True):
                    state["second_moment"].copy_(moment)
            if side == "right":
                U = U.mT if R is None else U.mT @ R.mT
            elif R is not None:
                U = R @ U
            if group["rms"] is not None:
                norm = torch.linalg.vector_norm(U, dim=(-2, -1), keepdim=True)
                U = U * (group["rms"] * math.sqrt(U.size(-2) * U.size(-1)) / norm.clamp_min(_FLOOR))
            directions.append(U)
        return directions

    def _base_rule(self, second_moment: Tensor | None, group: Group) -> BaseRule:
        base = group["base"]
        if base == "sinkhorn":
            return partial(sinkhorn_normalize, iters=group["sinkhorn_iters"])
        if second_moment is not None:
            return partial(_adam_rule, V=second_moment, beta2=group["beta2"])
        if base in _STATELESS:
            return _STATELESS[base]
        if self._own_base is None:
            raise ValueError(
                "the loaded state was made with a base rule of one's own, which it does not hold; "
                "pass the function as base"
            )
        return self._own_base


def _sign_rule(Z: Tensor) -> Tensor:
    return torch.where(Z.isnan(), Z, Z.sign())  # by itself, sign makes 0 of NaN


_STATELESS: dict[str, BaseRule] = {"sign": _sign_rule, "row_norm": row_normalize}


def _stack(updates: Sequence[Tensor]) -> Tensor:
    stack = updates[0].unsqueeze(0) if len(updates) == 1 else torch.stack(list(updates))
    return stack.to(torch.promote_types(stack.dtype, torch.float32))


def _same_shape(U: Tensor, Z: Tensor) -> Tensor:
    if U.shape != Z.shape:
        raise ValueError(f"base must keep shapes, but made {tuple(U.shape)} of {tuple(Z.shape)}")
    return U


def _second_moments(M: Tensor, states: Sequence[dict[str, Any]]) -> Tensor:
    for state in states:
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros(M.shape[1:], dtype=M.dtype, device=M.device)
    return torch.stack([state["second_moment"] for state in states])


def _rotations(
    Ms: Sequence[Tensor],
    states: Sequence[Sequence[dict[str, Any]]],
    fs: Sequence[BaseRule],
    group: Group,
) -> Tensor:
    """The rotations to step with, turned and kept if it is time."""
    owners = [state for stack in states for state in stack]
    if group["share_rotation"]:
        owners = [next((state for state in owners if "rotation" in state), owners[0])]
    M = Ms[0]
    for state in owners:
        if "rotation" not in state:
            state["rotation"] = torch.eye(M.size(-2), dtype=M.dtype, device=M.device)
    R = torch.stack([state["rotation"] for state in owners])
    every = group["rotation_every"]
    if every > 1:
        # A plain number, so that nothing has to be read from the device. Matrices of one shape turn together.
        due = any(state.get("rotation_wait", 0) == 0 for state in owners)
        for state in owners:
            state["rotation_wait"] = (every if due else state["rotation_wait"]) - 1
        if not due:
            return R
    R = _next_rotation(Ms, R, fs, group["policy"], group["qr"])
    for state, new in zip(owners, R, strict=True):
        state["rotation"].copy_(new)
    return R


def _check_base(base: Any, own: BaseRule | None) -> None:
    if callable(base):
        raise ValueError("a group names its base; a function is given to the optimizer, for all groups")
    if isinstance(base, str) and base.lower() in _EQUIVARIANT:
        raise ValueError(
            f"base={base!r} gives the same direction in every frame, so that rotations change nothing; "
            f"take one of {', '.join(get_args(BaseName))}, or that optimizer itself"
        )
    if base not in get_args(BaseName) and not (base == "own" and own is not None):
        raise ValueError(f"base must be one of {', '.join(get_args(BaseName))} or a function, got {base!r}")


def _matrix_sides(shapes: Sequence[tuple[int, int]], group: Group) -> list[str]:
    """The side, left or right, on which each matrix is rotated."""
    side = group["side"]
    if not isinstance(side, str):
        return list(side)
    if side != "auto":
        return [side] * len(shapes)
    if not group["share_rotation"]:
        return ["left" if rows <= columns else "right" for rows, columns in shapes]
    common = set.intersection(*(set(shape) for shape in shapes))
    if not common:
        raise ValueError(
            f"share_rotation needs a size that all matrices of the group have in common, got shapes {shapes}; "
            "give those of other sizes a group of their own"
        )
    return ["left" if rows == min(common) else "right" for rows, _ in shapes]


def _check_sides(params: Sequence[Tensor], group: Group) -> None:
    side, shared = group["side"], group["share_rotation"]
    named = isinstance(side, str)
    if named and side not in get_args(Side):
        raise ValueError(f"side must be one of {', '.join(get_args(Side))}, got {side!r}")
    if not named:
        if not isinstance(side, Sequence) or not all(s in ("left", "right") for s in side):
            raise ValueError(f'side must be a name, or a list of "left" and "right", got {side!r}')
        if len(side) != len(params):
            raise ValueError(
                f"side names {len(side)} sides for the {len(params)} parameters that the rule takes of its group; "
                "give the group use_matrix_rule=True"
            )
    if not params or (named and not shared):
        return
    if group["stacked"] or group["split"] is not None:
        raise ValueError("stacked and split go neither with share_rotation nor with a list of sides")
    shapes = [matrix_shape(p.shape) for p in params]
    sides = _matrix_sides(shapes, group)
    if shared:
        sizes = [shape[0] if s == "left" else shape[1] for shape, s in zip(shapes, sides, strict=True)]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"parameters that share a rotation must agree in the size of the side that it acts on, got sizes "
                f"{sizes} of shapes {shapes}"
            )
        if len({(p.device, p.dtype) for p in params}) > 1:
            raise ValueError("parameters that share a rotation must have one device and one dtype")
