"""Orthogonalised momentum in a few columns of a cosine basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightlab.linalg import newton_schulz
from weightlab.linalg.coefficients import resolve_coefficients
from weightlab.linalg.column_selection import (
    Basis,
    Norm,
    basis_vectors,
    check_basis,
    check_norm,
    check_rank,
    select_tall,
)
from weightlab.linalg.cosine_transform import Transform, uses_fft
from weightlab.linalg.native_dtype import DtypeChoice, check_dtype
from weightlab.optim.dct_adamw import low_rank_direction, tall
from weightlab.optim.lr_scaling import AdjustLR, check_adjust_lr, lr_factor, matrix_shape
from weightlab.optim.matrix_optimizer import (
    AdamWOptions,
    ApplyTo,
    Directions,
    Group,
    MatrixOptimizer,
    MatrixOptions,
)


class Trion(MatrixOptimizer):
    r"""SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (arXiv 2505.17967), section on Trion.

    Dion with the power iteration and its QR replaced by a choice of columns from the cosine basis. For G of
    shape m×n, m ≥ n (wide matrices as their transposes), with a buffer M of the same shape:

    .. math::
        M \leftarrow M + G, \quad I = \text{top-}r\ \lVert (M Q)_{:,j} \rVert_p, \quad g = M Q_{:,I}

    .. math::
        M \leftarrow M - (1 - \mu)\, g\, Q_{:,I}^\top, \quad
        W \leftarrow (1 - \eta\lambda) W - \eta\, s\, \mathrm{NS}(g)\, Q_{:,I}^\top

    What the chosen columns hold decays by μ; the rest stays in M whole until its turn comes. The update has rank
    at most r, and its non-zero singular values are those that Newton-Schulz leaves, near one.

    The official file does not run as published, and in one of its branches what it takes for a projection is none;
    this follows the paper.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either.
        lr: Learning rate. Default 0.02.
        momentum: μ, in [0, 1). Default 0.95.
        weight_decay: Decoupled weight decay. Default 0.
        rank: r, or a fraction of the shorter side in (0, 1]. At most n columns are used. Default 128.
        coefficients: Of Newton-Schulz: a name out of `COEFFICIENTS` or ``(a, b, c)`` triples. Default ``"muon"``.
        ns_steps: Its steps. Default 5.
        ns_dtype: Type of its products. Default None: float32, or float64 for float64 parameters. ``"auto"``: bfloat16
            where the device has it natively, else as before. The official code has bfloat16.
        basis: As in `DCTAdamW`: ``"dct2"`` (default), ``"dct3"``, ``"random"`` or ``"identity"``.
        transform: ``"matmul"``, ``"fft"``, or ``"auto"`` (default): by size.
        select_norm: p, 1 (default) or 2.
        adjust_lr: ``"original"`` (default): s = √max(1, m/n), for m rows and n columns; ``"match_rms_adamw"``:
            0.2·√max(m, n), which gives a root mean square of 0.2·√(r/min(m, n)); ``"dion"``: √(m/n); None: 1.
        apply_to: As in `MatrixOptimizer`. Default ``"matrices"``. The rule refuses vectors.
        adamw: Options of AdamW for the others; see `AdamWOptions`.
        maximize: Ascend. Default False.
        foreach: As in `MatrixOptimizer`. Default None.
        **options: ``stacked``, ``split`` and ``nonfinite``; see `MatrixOptions`.

    Raises:
        TypeError: For modules, complex or integer parameters, sparse gradients.
        ValueError: For options out of range, and for vectors given to the rule.

    Complexity:
        About 2.5·m·n·log₂(n) flops for choosing, by FFT, 4·m·n·r for M and W, and 4·m·r² + 2·r³ for each
        Newton-Schulz step, against Muon's 4·m·n² + 2·n³. State: m·n numbers, at least float32.

    Example:
        >>> layer = torch.nn.Linear(8, 16, bias=False)
        >>> optimizer = Trion(layer.parameters(), lr=0.1, rank=2)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.randn(32, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int(torch.linalg.matrix_rank(layer.weight.detach() - before, rtol=1e-3))
        2
    """

    takes_vectors = False
    has_own_momentum = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 128,
        coefficients: str | Sequence[Sequence[float]] = "muon",
        ns_steps: int | None = 5,
        ns_dtype: DtypeChoice = None,
        basis: Basis = "dct2",
        transform: Transform = "auto",
        select_norm: Norm = 1,
        adjust_lr: AdjustLR | Literal["dion"] | None = "original",
        apply_to: ApplyTo = "matrices",
        adamw: AdamWOptions | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        **options: Unpack[MatrixOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "coefficients": coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "basis": basis,
            "transform": transform,
            "select_norm": select_norm,
            "adjust_lr": adjust_lr,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults, apply_to=apply_to, adamw=adamw, **options)

    def check_group(self, group: Group) -> None:
        """Raise ValueError for options out of range."""
        super().check_group(group)
        check_rank(group["rank"])
        check_basis(group["basis"])
        check_norm(group["select_norm"])
        check_dtype(group["ns_dtype"], "ns_dtype")
        uses_fft(1, group["transform"])
        resolve_coefficients(group["coefficients"]).schedule(group["ns_steps"])
        if group["adjust_lr"] != "dion":
            check_adjust_lr(group["adjust_lr"])

    def batches_equal_shapes(self, group: Group) -> bool:
        """Orthogonalise equal shapes together."""
        return True

    def stacking_shape(self, shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
        """Wide matrices go with the tall ones that they are transposes of."""
        return tuple(sorted(shape, reverse=True))

    def lr_factor(self, shape: Sequence[int], group: Group) -> float:
        """Return `s`."""
        if group["adjust_lr"] == "dion":
            rows, columns = matrix_shape(shape)
            return (rows / columns) ** 0.5
        return lr_factor(shape, group["adjust_lr"])

    def directions(
        self, updates: Sequence[Tensor], states: Sequence[dict[str, Any]], group: Group
    ) -> Directions:
        """Project the buffer, let what was captured decay, orthogonalise it."""
        lows: list[Tensor] = []
        vectors: list[Tensor] = []
        for update, state in zip(updates, states, strict=True):
            if "momentum" not in state:
                wide = torch.promote_types(update.dtype, torch.float32)
                state["momentum"] = torch.zeros_like(
                    update, dtype=wide, memory_format=torch.contiguous_format
                )
            buffer = tall(state["momentum"].add_(update))
            low, indices = select_tall(
                buffer, group["rank"], group["basis"], group["select_norm"], group["transform"]
            )
            rows = basis_vectors(indices, buffer.shape[-1], group["basis"], buffer.dtype)
            buffer.addmm_(low, rows, alpha=-(1 - group["momentum"]))
            lows.append(low)
            vectors.append(rows)
        orthogonal = newton_schulz(
            torch.stack(lows), group["coefficients"], group["ns_steps"], dtype=group["ns_dtype"]
        )
        return Directions(
            [
                low_rank_direction(update, low, rows)
                for update, low, rows in zip(updates, orthogonal.unbind(), vectors, strict=True)
            ]
        )
