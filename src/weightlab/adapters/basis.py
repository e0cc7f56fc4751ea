"""Columns of an orthogonal basis that everybody can regenerate and nobody has to send."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weightlab.linalg import dct_matrix, orthogonality_error

Kind = Literal["orthogonal", "gaussian", "hadamard"]
KINDS: tuple[Kind, ...] = ("orthogonal", "gaussian", "hadamard")

_PANEL = 64
_ORTHONORMAL = 1e-3


def shared_basis(
    n: int,
    r: int,
    *,
    slot: int | None = None,
    key: str | None = None,
    seed: int = 0,
    kind: Kind = "orthogonal",
    layer: str = "",
    basis: Tensor | None = None,
    slots: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return r columns of a basis of R^n that is the same for all who name the same seed.

    With `slot`, columns ``slot·r, …, slot·r + r - 1``: different slots of one rank share none. With `key`, r
    different columns at random, drawn from a hash of key, layer and width: no one has to hand out numbers,
    but a pair of keys shares r²/n columns on average, and none with probability ``C(n-r, r) / C(n, r)``.

    Kinds of basis:

    - ``"orthogonal"``: the orthogonal factor of a Gaussian matrix with the signs that make R's diagonal
      positive, so Haar distributed. Built in panels of 64 columns, each from the ones before it, so that low
      slots are cheap.
    - ``"hadamard"``: a Walsh-Hadamard matrix where n is a power of two, else the cosine transform, its rows'
      signs flipped at random. All columns cost the same.
    - ``"gaussian"``: entries N(0, 1/n), a draw of its own for each slot or key and layer. Columns of two draws
      are orthogonal on average only: ``BᵢᵀBⱼ`` has entries of standard deviation ``1/√n``.

    Or give directions of your own as rows of `basis`, most important first, such as `ActivationPCA` finds on
    neutral data. They are dealt to slots in turn, ``slot, slot + slots, slot + 2·slots, …``, so that each slot
    gets its share of the important ones. This option is ours, not the paper's.

    All is computed on the CPU in float64 on one thread from NumPy's frozen legacy stream, and rounded once.
    Equal arguments give equal bits in every process and with any number of threads. Another machine's linear
    algebra may differ in the last bits of the ``"orthogonal"`` kind; overlap between slots stays at rounding.

    Args:
        n: Width: input features of a layer.
        r: Columns, at most `n`.
        slot: Number of the adapter, from 0 to ``⌊n/r⌋ - 1`` (no upper end for Gaussian columns).
        key: Name of the adapter. Give either this or `slot`.
        seed: Which of the bases.
        kind: Which family.
        layer: Name of the layer; matters with `key`, and for Gaussian columns.
        basis: Orthonormal rows `(m, n)` with ``m ≥ r·slots``, any floating dtype, for use instead of a
            generated basis; needs `slot`.
        slots: Into how many slots `basis` is dealt. Default: ``⌊m/r⌋``.
        dtype: Of the result. Default: PyTorch's.

    Returns:
        A new tensor `(n, r)` on the CPU, with orthonormal columns unless Gaussian.

    Raises:
        ValueError: If r > n, if the slot is out of range, if not exactly one of slot and key is given, for an
            unknown kind, and for a `basis` of the wrong shape or without orthonormal rows.

    Complexity:
        ``"orthogonal"``: O(n c²) once per width and seed, with c the highest column asked for; kept for the
        process, 8 n c bytes. The others: O(n r), but O(n²) for the cosine transform.

    Reference:
        Po et al., "Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv 2312.02432.

    Example:
        >>> first, second = (shared_basis(32, 4, slot=slot, dtype=torch.float64) for slot in (0, 1))
        >>> bool(torch.allclose(first.T @ first, torch.eye(4, dtype=torch.float64)))
        True
        >>> float((first.T @ second).norm()) < 1e-14
        True
    """
    _check(n, r, slot, key, kind)
    if basis is not None:
        columns = _dealt(basis, n, r, slot, slots)
    elif kind == "gaussian":
        columns = torch.from_numpy(_stream("gaussian", seed, n, layer, _name(slot, key)).randn(n, r))
        columns /= math.sqrt(n)
    else:
        if slot is not None:
            if slot >= n // r:
                raise ValueError(
                    f"slot {slot} does not exist: width {n} has ⌊{n}/{r}⌋ = {n // r} disjoint slots of rank {r}, "
                    f"numbered from 0; lower the rank, or give a key to draw columns at random"
                )
            chosen = np.arange(slot * r, (slot + 1) * r)
        else:
            chosen = _stream("columns", seed, n, layer, _name(slot, key)).permutation(n)[:r]
        columns = (_haar_columns if kind == "orthogonal" else _structured_columns)(n, seed, chosen)
    return columns.to(dtype or torch.get_default_dtype())


def _check(n: int, r: int, slot: int | None, key: str | None, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= r <= n:
        raise ValueError(f"r must lie between 1 and the width n = {n}, got {r}")
    if (slot is None) == (key is None):
        raise ValueError(f"give either slot or key, got slot={slot} and key={key!r}")
    if slot is not None and slot < 0:
        raise ValueError(f"slot must be at least 0, got {slot}")


def _name(slot: int | None, key: str | None) -> str:
    return f"key {key}" if slot is None else f"slot {slot}"


def _dealt(basis: Tensor, n: int, r: int, slot: int | None, slots: int | None) -> Tensor:
    if slot is None:
        raise ValueError("directions of a given basis are dealt to slots; give slot instead of key")
    if basis.ndim != 2 or basis.shape[1] != n or not basis.is_floating_point():
        raise ValueError(
            f"basis must be a floating tensor of shape (m, {n}), got {basis.dtype} {tuple(basis.shape)}"
        )
    slots = len(basis) // r if slots is None else slots
    if not slot < slots or r * slots > len(basis):
        raise ValueError(
            f"slot {slot} of {slots} slots of rank {r} does not fit a basis of {len(basis)} directions; "
            f"lower the rank or the number of slots"
        )
    rows = basis.detach()[slot::slots][:r].to("cpu", torch.float64)
    error = float(orthogonality_error(rows))
    if not error < _ORTHONORMAL:
        raise ValueError(
            f"the rows of basis are not orthonormal: the root mean square of σ² - 1 is {error:.2g}"
        )
    return rows.mT.clone()


def _stream(*parts: object) -> np.random.RandomState:
    """Return a generator seeded by a hash of what it is for.

    The legacy generator, because its streams are frozen; those of NumPy's newer ones and of PyTorch's
    may change between versions.
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, "<u4"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let linear algebra run on one thread, so that its sums come in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Haar:
    """The leading columns of an orthogonal matrix, grown panel by panel.

    Panel p is panel p of a Gaussian matrix, projected off the panels before it (twice, against rounding) and
    orthonormalised with positive diagonal: column for column the unique QR factor of the whole, whose bits do
    not depend on how many columns were ever asked for.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self.done = torch.empty(n, 0, dtype=torch.float64)

    def leading(self, count: int) -> Tensor:
        while self.done.shape[1] < count:
            start = self.done.shape[1]
            G = torch.from_numpy(
                _stream("orthogonal", self.seed, self.n, start // _PANEL).randn(
                    self.n, min(_PANEL, self.n - start)
                )
            )
            with _one_thread(), torch.no_grad():
                for _ in range(2):
                    G = G - self.done @ (self.done.mT @ G)
                    Q, R = torch.linalg.qr(G)
                    G = Q * R.diagonal().sign()
            self.done = torch.cat([self.done, G], 1)
        return self.done


_haar = lru_cache(maxsize=8)(_Haar)


def _haar_columns(n: int, seed: int, chosen: np.ndarray) -> Tensor:
    return _haar(n, seed).leading(int(chosen.max()) + 1)[:, torch.from_numpy(chosen)]


def _structured_columns(n: int, seed: int, chosen: np.ndarray) -> Tensor:
    signs = torch.from_numpy(_stream("hadamard", seed, n).randint(0, 2, n) * 2.0 - 1.0)
    if n & (n - 1) == 0:
        bits = np.arange(n)[:, None] & chosen
        for shift in (32, 16, 8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        columns = torch.from_numpy(1.0 - 2.0 * (bits & 1)) / math.sqrt(n)
    else:
        columns = dct_matrix(n, dtype=torch.float64)[torch.from_numpy(chosen)].T
    return columns * signs[:, None]
