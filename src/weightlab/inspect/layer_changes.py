"""What became of one layer between two checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightlab.inspect.layer_pairs import Pair
from weightlab.inspect.layers import Layer
from weightlab.inspect.report import LayerRow, inspect_layer
from weightlab.inspect.spectrum import SLICE_FACTOR, ConvView
from weightlab.linalg.singular_triples import top_svd

# Sine of the largest angle by which an approximate subspace may be off.
_LARGEST_ANGLE = 0.1
# Up to this side, singular vectors are had from a full decomposition.
_EXACT_UP_TO = 512
_TOP = 8
_UNREAD = ("non-finite", "out of range", "unreadable type", "too large")


@dataclass(frozen=True)
class ChangeRow:
    """What became of one layer. Numbers that could not be had are NaN, counts None.

    W is the weight before, ΔW what was added to it. Kernels are read as asked for by `conv`.

    Attributes:
        name: As in the first checkpoint.
        kind: `"matrix"` or `"conv"`.
        shape: Shape of what was compared.
        status: `"ok"`; `"unchanged"`; `"too small"`, `"too large"`, `"too few"`, `"degenerate"`, `"out of range"`
            or `"unreadable type"`, as for [`LayerRow`][weightlab.inspect.LayerRow] but of ΔW; `"non-finite before"`
            or `"non-finite after"`.
        rows: Rows before and after, for a table of tokens that was resized: of it, the rows common to both are
            compared. None elsewhere.
        alpha_before: Exponent α of W.
        alpha_after: Exponent of W + ΔW.
        relative_norm: ‖ΔW‖ / ‖W‖ (Frobenius).
        spectral_norm: Largest singular value of ΔW.
        stable_rank: ‖ΔW‖² / σ_max².
        effective_rank: exp of the entropy of σᵢ/Σσ of ΔW.
        rank: Singular values of ΔW above what rounding to the stored type leaves,
            `eps · rms(W) · (√m + √n) / √12`: a low-rank change that was merged into a weight has its own rank.
        alpha: Exponent of ΔW's own tail.
        sigma: Standard error of `alpha`.
        n_tail: Number of eigenvalues in that tail.
        overlap_out: Overlap ‖UᵀU′‖²/k of the spaces of the k largest left singular vectors before and after, from 0 to 1;
            k is 8, or a quarter of the shorter side where that is less. Strange spaces have about k / rows. NaN
            where an approximate space of a large matrix is not certain, because its singular values are near each other.
        overlap_in: The same of right singular vectors.
        overlap: Mean of the two.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str
    rows: tuple[int, int] | None = None
    alpha_before: float = math.nan
    alpha_after: float = math.nan
    relative_norm: float = math.nan
    spectral_norm: float = math.nan
    stable_rank: float = math.nan
    effective_rank: float = math.nan
    rank: int | None = None
    alpha: float = math.nan
    sigma: float = math.nan
    n_tail: int | None = None
    overlap_out: float = math.nan
    overlap_in: float = math.nan
    overlap: float = math.nan

    @property
    def notes(self) -> str:
        """What there is to say beside the numbers: a status other than "ok", and how a table was resized."""
        resized = "" if self.rows is None else f"{self.rows[0]} → {self.rows[1]} rows"
        return ", ".join(filter(None, ("" if self.status == "ok" else self.status, resized)))


class Change(NamedTuple):
    """All that was read from a pair of layers: its row, the rows of W, W + ΔW and ΔW, and their eigenvalues."""

    row: ChangeRow
    before: LayerRow
    after: LayerRow
    delta: LayerRow | None
    eigenvalues: dict[str, Tensor]


def change_rows(
    pairs: Sequence[Pair],
    *,
    conv: ConvView = "slices",
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    min_eigenvalues: int = 8,
    max_eigenvalues: int = 15_000,
) -> Iterator[Change]:
    """Read pairs of layers one after the other, as their results are asked for.

    Args:
        pairs: From [`pair_layers`][weightlab.inspect.pair_layers].
        conv, dtype, device, min_eigenvalues, max_eigenvalues: As for
            [`compare_checkpoints`][weightlab.inspect.compare_checkpoints].

    Yields:
        For each pair, in order, all that was read.

    Example:
        >>> layers = [Layer("w", "matrix", (9, 9), torch.float32, lambda s=s: s * torch.eye(9)) for s in (1, 3)]
        >>> [round(change.row.relative_norm, 3) for change in change_rows([Pair(*layers)])]
        [2.0]
    """
    options: dict[str, Any] = {
        "conv": conv,
        "dtype": dtype,
        "device": device,
        "min_eigenvalues": min_eigenvalues,
        "max_eigenvalues": max_eigenvalues,
    }
    for pair in pairs:
        yield _change(pair, options)


def _change(pair: Pair, options: dict[str, Any]) -> Change:
    # Each weight is loaded once, and held until the pair is done.
    first, second = (dataclasses.replace(layer, load=functools.cache(layer.load)) for layer in pair[:2])
    found: dict[str, Tensor] = {}

    def read(layer: Layer, which: str) -> LayerRow:
        row, eigenvalues = inspect_layer(layer, **options)
        if eigenvalues is not None:
            found[which] = eigenvalues.cpu()
        return row

    before = read(first, "before")
    facts: dict[str, Any] = {"name": first.name, "kind": first.kind, "shape": first.shape, "rows": pair.rows}
    facts["alpha_before"] = before.alpha
    readable = before.status not in _UNREAD and second.dtype is not None
    delta = _difference(first, second, options["device"]) if readable else None
    if delta is not None and not bool(delta.any()):
        after = dataclasses.replace(before, name=second.name, dtype=str(second.dtype).removeprefix("torch."))
        found |= {"after": found["before"]}
        facts |= {"alpha_after": after.alpha, "relative_norm": 0.0, "spectral_norm": 0.0, "rank": 0}
        overlaps: dict[str, Any] = {"overlap_out": 1.0, "overlap_in": 1.0, "overlap": 1.0}
        return Change(ChangeRow(**facts, **overlaps, status="unchanged"), before, after, None, found)
    after = read(second, "after")
    facts["alpha_after"] = after.alpha
    for row, when in ((before, "before"), (after, "after")):
        if row.status in _UNREAD:
            status = f"non-finite {when}" if row.status == "non-finite" else row.status
            return Change(ChangeRow(**facts, status=status), before, after, None, found)
    assert delta is not None
    change = read(dataclasses.replace(first, dtype=delta.dtype, load=lambda: delta), "delta")
    if "delta" in found:
        sliced = first.kind == "conv" and options["conv"] == "slices"
        facts |= _sizes(found, change, sliced, first, second)
        facts |= _overlaps(first.load(), second.load(), options["device"])
    return Change(ChangeRow(**facts, status=change.status), before, after, change, found)


def _difference(first: Layer, second: Layer, device: torch.device | str | None) -> Tensor:
    W, V = (layer.load() if device is None else layer.load().to(device) for layer in (first, second))
    dtype = torch.float64 if torch.float64 in (W.dtype, V.dtype) else torch.float32
    # 8-bit types have no arithmetic; others are converted in passing.
    return V.to(dtype, copy=True).sub_(W.to(dtype) if W.dtype.itemsize == 1 else W.to(V.device))


def _sizes(
    found: dict[str, Tensor], change: LayerRow, sliced: bool, first: Layer, second: Layer
) -> dict[str, Any]:
    scale = SLICE_FACTOR if sliced else 1.0
    x, W, V = (found[which].double() for which in ("delta", "before", "after"))
    sides = first.shape[:2] if sliced else (first.shape[0], math.prod(first.shape[1:]))
    rank = None
    if found["delta"].dtype == torch.float64:
        assert first.dtype is not None
        assert second.dtype is not None
        eps = max(torch.finfo(first.dtype).eps, torch.finfo(second.dtype).eps)
        rms = math.sqrt(float(V.sum()) / math.prod(first.shape))
        rounding = eps * rms * sum(map(math.sqrt, sides)) / math.sqrt(12)
        resolved = torch.finfo(torch.float64).eps * max(sides) * float(x[-1])
        rank = int((x > max(rounding**2, resolved)).sum())
    whole = float(W.sum())
    return {
        "relative_norm": math.sqrt(float(x.sum()) / whole) if whole else math.inf,
        "spectral_norm": math.sqrt(float(x[-1]) / scale),
        "stable_rank": change.stable_rank,
        "effective_rank": change.effective_rank,
        "rank": rank,
        "alpha": change.alpha,
        "sigma": change.sigma,
        "n_tail": change.n_tail,
    }


def _overlaps(W: Tensor, V: Tensor, device: torch.device | str | None) -> dict[str, float]:
    k = max(1, min(_TOP, min(W.shape[0], W[0].numel()) // 4))
    found = [_leading(weight if device is None else weight.to(device), k) for weight in (W, V)]
    if found[0] is None or found[1] is None:
        return {}
    out, inner = (float((a.mT @ b).square().sum()) / k for a, b in zip(found[0], found[1], strict=True))
    return {"overlap_out": out, "overlap_in": inner, "overlap": (out + inner) / 2}


def _leading(weight: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Bases of the k leading left and right singular vectors, as columns; None where they are not certain."""
    W = weight.flatten(1)
    W = W if W.dtype == torch.float64 else W.float()
    exact = min(W.shape) <= _EXACT_UP_TO
    with warnings.catch_warnings():
        # What the warning says, that values are near each other, is looked at below.
        warnings.simplefilter("ignore", RuntimeWarning)
        top = top_svd(W, min(k + 1, *W.shape), "full" if exact else "randomized", iterations=8)
    if float(top.S[0]) == 0:
        return None
    if not exact:
        gap = float(top.S[k - 1] - top.S[k])
        if float(top.certificate.residual * top.S[0]) > _LARGEST_ANGLE * gap:
            return None
    return top.U[:, :k].double(), top.Vh[:k].mT.double()
