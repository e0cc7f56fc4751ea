"""The matrix sign (polar factor) of rectangular matrices by polynomial iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from weightlab.linalg.coefficients import CoefficientSet, Triple, resolve_coefficients
from weightlab.linalg.native_dtype import DtypeChoice, fastest_dtype
from weightlab.linalg.padding import merge_shapes, stack_padded, unstack_padded
from weightlab.linalg.sign_method import METHODS, Method, choose_method, gram_segment_length, is_steep
from weightlab.linalg.symmetric_products import gram, symmetric_product


def newton_schulz(
    X: Tensor,
    coefficients: str | CoefficientSet | Sequence[Sequence[float]] = "muon",
    steps: int | None = None,
    *,
    eps: float = 1e-7,
    dtype: DtypeChoice = None,
    method: Method | Literal["auto"] = "auto",
) -> Tensor:
    r"""Push all singular values of each matrix towards one and keep the singular vectors.

    With :math:`X = U S V^\top`, returns :math:`U p(S / \lVert X \rVert_F) V^\top`, where :math:`p` is the
    composition of the steps' polynomials :math:`a s + b s^3 + c s^5`. Only matrix products are used:
    :math:`A = X X^\top`, then :math:`X \leftarrow a X + (b A + c A^2) X`, on the short side.

    A zero matrix stays zero; a matrix that holds NaN or infinity becomes NaN, other matrices of the
    batch are untouched by it.

    The same polynomials can be evaluated in three ways:

    - `"direct"`: as written above, by plain products.
    - `"symmetric"`: the same, but of :math:`A` and :math:`A^2` only one triangle is computed.
    - `"gram"`: :math:`A = X X^\top` once, then :math:`B = a I + b A + c A^2`, :math:`P \leftarrow B P`,
      :math:`A \leftarrow B A B` on the short side alone, all symmetric; :math:`P X` at the end. Every
      matrix is carried as a multiple of the identity plus a rest whose diagonal has mean zero, so that
      rounding acts on the rest only. It starts afresh from X where rounding would
      be amplified: see `weightlab.linalg.sign_method.gram_segments`.

    They differ by rounding. Relative to the exact result in the Frobenius norm, for five steps of the named
    sets and spectra from flat to :math:`\propto 1/i^2`, with spikes, gaps and low rank: in float32 every way
    errs by less than 1e-4. In bfloat16 `"direct"` errs by about 0.01 (0.3 where most singular values are below
    a thousandth of the largest), `"gram"` by less on Gaussian matrices with n ≥ 2m, and by at most four times as
    much, or 0.12, whichever is more, on the others.

    Args:
        X: Shape `(..., m, n)`, floating point. The leading dimensions are a batch.
        coefficients: A name out of `COEFFICIENTS`, a `CoefficientSet`, or a sequence of `(a, b, c)`, one
            per step; a sequence of one triple is used at every step.
        steps: Number of steps; `None` takes the set's own (5 for the sets made for optimizers), or the
            length of the sequence.
        eps: Added to the Frobenius norm before the division. Default 1e-7, as in Muon.
        dtype: Type to iterate in; `None` keeps that of `X`. `"auto"` takes bfloat16 where the device has
            it natively, else float32, and keeps float64. bfloat16 halves the cost where it is native and
            can be slower where it is not.
        method: How to evaluate the polynomials; `"auto"` takes what a small cost model finds fastest for
            the shape, type and device. Under `torch.compile` and where a gradient is asked for,
            products are plain ones whatever the method.

    Returns:
        A new tensor with the shape, dtype and device of `X`. The norm is taken in float32 (float64
        for float64 input) per matrix whatever the types.

    Raises:
        TypeError: If `X` is not a floating-point tensor.
        ValueError: If `X` has fewer than two dimensions, or coefficients, steps or method are unusable.

    Complexity:
        Flops a matrix for m ≤ n and K steps: `"direct"` `K·(4·m²·n + 2·m³)`, `"symmetric"`
        `K·(3·m²·n + m³)`, `"gram"` in one piece `3·m²·n + (4K − 3)·m³`. For the latter two, this counts half of each
        symmetric product; what is really saved is in `weightlab.linalg.symmetric_products.relative_cost`.

    References:
        Polynomials and their sources are in `COEFFICIENTS`.

    Example:
        >>> X = torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
        >>> newton_schulz(X, "cubic").round(decimals=4) + 0.0
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.]])
    """
    _check(X, "newton_schulz")
    chosen = resolve_coefficients(coefficients)
    schedule = chosen.schedule(steps, (X.size(-2), X.size(-1)))
    if method != "auto" and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are auto, {', '.join(METHODS)}")
    if X.numel() == 0:
        return X.clone()
    working = fastest_dtype(X.dtype, X.device) if dtype == "auto" else dtype or X.dtype

    batch = X.flatten(0, -3) if X.ndim > 3 else X
    count = batch.size(0) if batch.ndim == 3 else 1
    m, n = min(X.size(-2), X.size(-1)), max(X.size(-2), X.size(-1))
    if method == "auto":
        method = choose_method(m, n, schedule, working, X.device, count)

    def sign(matrices: Tensor) -> Tensor:
        return _sign(matrices, schedule, chosen.safety, eps, working, method)

    if count > 1 and m >= _ALONE_FROM and _may_loop(X):
        out = torch.empty_like(batch, memory_format=torch.contiguous_format)
        for source, target in zip(batch.unbind(), out.unbind(), strict=True):
            target.copy_(sign(source))
        return out.view(X.shape)
    return sign(batch).to(X.dtype).reshape(X.shape)


def newton_schulz_foreach(
    matrices: Sequence[Tensor],
    coefficients: str | CoefficientSet | Sequence[Sequence[float]] = "muon",
    steps: int | None = None,
    *,
    waste: float = 0.125,
    eps: float = 1e-7,
    dtype: DtypeChoice = None,
    method: Method | Literal["auto"] = "auto",
) -> list[Tensor]:
    """`newton_schulz` of many matrices of any shapes, in as few batches as pays.

    Matrices that share a device, a dtype, the shorter side, and the coefficients that their shapes call for go
    into one batch; tall ones are transposed, and shorter ones padded by columns of zeros, which change no
    singular value, as long as at most a share `waste` of the batch is padding. On a CPU, matrices
    with a short side of 256 and more gain nothing from a batch and are done one at a time.

    Args:
        matrices: Tensors of shape `(m, n)`, floating point.
        coefficients: As for `newton_schulz`; sets that depend on the shape take that of each matrix itself.
        steps: As for `newton_schulz`.
        waste: Largest share of padding in a batch; 0 to batch equal shapes only.
        eps: As for `newton_schulz`.
        dtype: As for `newton_schulz`.
        method: As for `newton_schulz`.

    Returns:
        A new tensor for each matrix, in their order. Views of the batches' results.

    Raises:
        TypeError: If one is not a floating-point tensor.
        ValueError: If one does not have two dimensions, or an option is unusable.

    Example:
        >>> a, b = torch.randn(8, 12), torch.randn(13, 8)
        >>> A, B = newton_schulz_foreach([a, b])
        >>> torch.allclose(B, newton_schulz(b), atol=1e-5)
        True
    """
    for matrix in matrices:
        _check(matrix, "newton_schulz_foreach", exactly_two=True)
    chosen = resolve_coefficients(coefficients)
    families: dict[object, list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        schedule = chosen.schedule(steps, (rows, columns))
        alone = (
            matrix.numel() == 0
            or (matrix.device.type == "cpu" and min(rows, columns) >= _BATCHED_BELOW)
            or type(matrix) not in (Tensor, torch.nn.Parameter)
        )
        key = (index,) if alone else (matrix.device, matrix.dtype, schedule)
        families.setdefault(key, []).append(index)

    results: list[Tensor | None] = [None] * len(matrices)
    for family in families.values():
        shapes = [(matrices[i].size(0), matrices[i].size(1)) for i in family]
        for group in merge_shapes(shapes, waste):
            members = [family[g] for g in group]
            schedule = chosen.schedule(steps, shapes[group[0]])
            fixed = CoefficientSet(triples=schedule, steps=len(schedule), safety=chosen.safety)
            if len(members) == 1:
                found = [newton_schulz(matrices[members[0]], fixed, eps=eps, dtype=dtype, method=method)]
            else:
                stacked = stack_padded([matrices[i] for i in members])
                done = newton_schulz(stacked, fixed, eps=eps, dtype=dtype, method=method)
                found = unstack_padded(done, [shapes[g] for g in group])
            for i, result in zip(members, found, strict=True):
                results[i] = result
    return cast("list[Tensor]", results)


# Shorter sides from which a CPU is better off with one matrix after another, each staying in the cache.
_ALONE_FROM = 512
_BATCHED_BELOW = 256


def _check(X: Tensor, name: str, exactly_two: bool = False) -> None:
    if not X.is_floating_point():
        raise TypeError(f"{name} needs a real floating-point tensor, got {X.dtype}")
    if X.ndim < 2 or (exactly_two and X.ndim != 2):
        wanted = "(m, n)" if exactly_two else "(..., m, n)"
        raise ValueError(f"{name} needs matrices of shape {wanted}, got {tuple(X.shape)}")


def _may_loop(X: Tensor) -> bool:
    return (
        X.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and X.requires_grad)
    )


def _sign(
    X: Tensor,
    schedule: tuple[Triple, ...],
    safety: float,
    eps: float,
    dtype: torch.dtype,
    method: Method,
) -> Tensor:
    """Normalise matrices of shape (m, n) or (batch, m, n), apply the polynomials, and leave them in dtype."""
    tall = X.size(-2) > X.size(-1)
    wide = X.mT if tall else X
    exact = wide.to(torch.promote_types(X.dtype, torch.float32))
    norm = torch.linalg.vector_norm(exact, dim=(-2, -1), keepdim=True)
    wide = (exact / (norm * safety + eps)).to(dtype)
    if method == "gram":
        wide = _gram_form(wide, schedule, _may_loop(X))
    else:
        for triple in schedule:
            wide = (_direct_step if method == "direct" else _symmetric_step)(wide, triple)
    return wide.mT if tall else wide


def _direct_step(X: Tensor, triple: Triple) -> Tensor:
    a, b, c = triple
    multiply_add = torch.addmm if X.ndim == 2 else torch.baddbmm
    A = X @ X.mT
    if c == 0:
        return multiply_add(X, A, X, beta=a, alpha=b)
    return multiply_add(X, multiply_add(A, A, A, beta=b, alpha=c), X, beta=a)


def _symmetric_step(X: Tensor, triple: Triple) -> Tensor:
    a, b, c = triple
    multiply_add = torch.addmm if X.ndim == 2 else torch.baddbmm
    A = gram(X)
    if c == 0:
        return multiply_add(X, A, X, beta=a, alpha=b)
    return multiply_add(X, symmetric_product(A, A, [(b, A)], alpha=c), X, beta=a)


def _gram_form(X: Tensor, schedule: tuple[Triple, ...], may_look: bool) -> Tensor:
    """Apply the polynomials by powers of A = X Xᵀ; all matrices but X are symmetric and commute.

    `may_look` says that reading a number back to the host costs nothing.
    """
    may_look = may_look and X.ndim == 2 and not is_steep(schedule)
    while schedule:
        A = _centred(0.0, gram(X))
        spread = _spread(A) if may_look else None
        length = gram_segment_length(schedule, X.dtype, spread)
        P = None
        for i, (a, b, c) in enumerate(schedule[:length]):
            mean, rest = A
            square = symmetric_product(rest, rest, [(b + mean * (2 * c), rest)], alpha=c)
            B = _centred(a + mean * (b + mean * c), square)
            P = B if P is None else _product(B, P)
            if i + 1 < length:
                A = _product(B, _product(B, A))
        assert P is not None
        mean, rest = P
        scaled = (X * mean).to(X.dtype)
        # In place: as an argument of its own, addmm would copy it first.
        X = scaled.addmm_(rest, X) if X.ndim == 2 else scaled.baddbmm_(rest, X)
        schedule = schedule[length:]
    return X


# A symmetric matrix as mean·I + rest, where the diagonal of the rest has mean zero. The mean has shape (…, 1, 1),
# or () where that saves a pass, in float32 at least.
_Split = tuple[Tensor, Tensor]


def _centred(shift: Tensor | float, S: Tensor) -> _Split:
    """Split shift·I + S, in place."""
    diagonal = S.diagonal(dim1=-2, dim2=-1)
    exact = diagonal.to(torch.promote_types(S.dtype, torch.float32))
    mean = exact.mean(-1, keepdim=True)
    diagonal.copy_(exact - mean)
    # A CPU multiplies a half-precision matrix by a 0-dim float32 without rounding the latter.
    mean = mean.squeeze(-1) if S.ndim == 2 and S.device.type == "cpu" else mean.unsqueeze(-1)
    return mean + shift, S


def _product(left: _Split, right: _Split) -> _Split:
    """(l·I + L)(r·I + R) = l·r·I + (l·R + r·L + L R)."""
    (l_mean, L), (r_mean, R) = left, right
    return _centred(l_mean * r_mean, symmetric_product(L, R, [(l_mean, R), (r_mean, L)]))


def _spread(A: _Split) -> float:
    """Variance of the eigenvalues over their squared mean."""
    mean, rest = A
    return float(rest.float().square().mean() * rest.size(-1) / mean**2)
