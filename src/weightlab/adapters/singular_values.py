"""Singular values as what trains: which ones, the frozen vectors that go with them, and a parametrization."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from weightlab.linalg import top_svd
from weightlab.linalg.singular_triples import SVDMethod

Rank = int | Literal["all"] | None
EnergyKind = Literal["squared", "nuclear"]

# Vectors of values closer than this, relative to the largest, turn by a tenth of a radian from one machine to another.
CLOSE = 1e-6


class Triples(NamedTuple):
    """Leading singular triples of a weight, and what identifies it.

    Attributes:
        left: (out, r), orthonormal columns.
        values: (r,), falling.
        right: (r, in), orthonormal rows.
        following: () Singular value r + 1, an estimate if the decomposition is randomized; 0 if there is none.
        checksum: (1,) int64, of the weight's entries.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    following: Tensor
    checksum: Tensor

    def indistinct(self) -> int | None:
        """Return the first index, from 1, whose value is too close to the next to tell their vectors apart."""
        gaps = -torch.cat([self.values, self.following[None]]).diff()
        if self.values.numel() == min(len(self.left), self.right.size(-1)):
            gaps = gaps[:-1]
        close = (gaps <= CLOSE * self.values[0]).nonzero()
        return int(close[0]) + 1 if len(close) else None


class _Cache:
    """Triples by weight, the least recently used dropped first, on the host."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, Triples] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Triples | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, triples: Triples) -> None:
        with self._lock:
            self._entries[key] = Triples(*(tensor.to("cpu", copy=True) for tensor in triples))
            while self.size() > self.max_bytes:
                self._entries.popitem(last=False)

    def size(self) -> int:
        return sum(t.numel() * t.element_size() for triples in self._entries.values() for t in triples)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


CACHE = _Cache(2**28)


def energy_rank(values: Tensor, energy: float = 0.99, kind: EnergyKind = "squared") -> int:
    """Find the smallest number of singular values that hold a share of a matrix.

    Args:
        values: (k,), falling and at least 0.
        energy: The share, in (0, 1].
        kind: `"squared"`: Σσ² over the first r, relative to all, the share of the squared Frobenius norm. `"nuclear"`: Σσ,
            which asks for far more of a slowly falling spectrum.

    Returns:
        1 to k; 1 for zeros.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> values = torch.tensor([10.0, 1.0, 0.1])
        >>> energy_rank(values, 0.99), energy_rank(values, 0.995), energy_rank(values, 0.99, "nuclear")
        (1, 2, 2)
    """
    check_energy(energy, kind)
    shares = values.double() if kind == "nuclear" else values.double().square()
    total = shares.cumsum(0)
    return min(int((total < energy * total[-1]).sum()) + 1, len(values)) if total[-1] > 0 else 1


def check_energy(energy: float, kind: str) -> None:
    """Raise ValueError unless the options of `energy_rank` are in range."""
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must be in (0, 1]")
    if kind not in get_args(EnergyKind):
        raise ValueError(f"energy_kind={kind!r} must be one of {', '.join(get_args(EnergyKind))}")


def leading_triples(
    matrix: Tensor,
    r: Rank = None,
    *,
    energy: float = 0.99,
    energy_kind: EnergyKind = "squared",
    svd: SVDMethod = "auto",
) -> Triples:
    """Compute the leading singular triples of a weight, once for equal weights.

    Results are kept in memory by a hash of the entries, up to 256 MiB of them, so that further adapters on the same
    base start at once.

    Args:
        matrix: (out, in), floating point.
        r: How many; `"all"`: min(out, in). Default None: as many as hold `energy`.
        energy: See `energy_rank`.
        energy_kind: See `energy_rank`.
        svd: Method of `weightlab.linalg.top_svd`. Finding r by energy takes a full decomposition whatever it is.

    Returns:
        At least float32, on the device of the matrix.

    Raises:
        TypeError: If the matrix is not floating point.
        ValueError: If it has no finite values, or an option is out of range.

    Example:
        >>> triples = leading_triples(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
        >>> triples.values, triples.following
        (tensor([3., 2.]), tensor(1.))
    """
    check_energy(energy, energy_kind)
    if matrix.is_meta:
        raise ValueError("a weight on the meta device has no singular values; load the model's weights first")
    matrix = matrix.detach()
    whole = min(matrix.shape)
    checksum = _checksum(matrix)
    rule: Hashable = (energy, energy_kind) if r is None else (whole if r == "all" else r, svd)
    key = (checksum, tuple(matrix.shape), matrix.dtype, rule)
    found = CACHE.get(key)
    if found is None:
        if r is None:
            U, S, Vh, _ = top_svd(matrix, whole, "full")
            count = energy_rank(S, energy, energy_kind)
            following = S[count] if count < whole else torch.zeros_like(S[0])
        else:
            count = whole if r == "all" else r
            U, S, Vh, certificate = top_svd(matrix, count, svd)
            following = certificate.outside
        found = Triples(U[:, :count], S[:count], Vh[:count], following, torch.tensor([checksum]))
        CACHE.put(key, found)
    return Triples(
        *(tensor.to(matrix.device, copy=True, memory_format=torch.contiguous_format) for tensor in found)
    )


def _checksum(matrix: Tensor) -> int:
    """64 bits of a hash of a matrix's entries, as a signed number other than 0."""
    raw = matrix.cpu().contiguous().view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True) or 1


class SingularValues(nn.Module):
    r"""SVFit as a parametrization of a weight, for `torch.nn.utils.parametrize.register_parametrization`.

    The weight becomes :math:`W + U \operatorname{diag}(\delta) V^\top`, with U and V the leading singular vectors of the
    weight as it was at registration, frozen, and δ zeros that train: the leading singular values become σ + δ. The
    original weight stays what it is, frozen if it was frozen. Weights of more than two dimensions are flattened to
    (out, rest), so that it fits convolutions and embeddings, too. Assigning to the weight changes the original alone;
    `remove_parametrizations` bakes the update in. δ is float32 (float64 for such a weight).

    Args:
        r: How many values train; `"all"` for min(out, in). Default None: as many as hold `energy`.
        energy: Share that they hold, 0.99 by default as in the paper, which does not define it.
        energy_kind: `"squared"` or `"nuclear"`; see `energy_rank`.
        relative: Make the values σ (1 + δ) instead, so that an optimizer that normalises moves large and small ones in
            proportion. Not from the paper. Default False.
        svd: Method of `weightlab.linalg.top_svd`.

    Attributes:
        delta: δ (r,), made when the parametrization is registered.

    Raises:
        TypeError: At registration, if the weight is not floating point.
        ValueError: If an option is out of range; at registration, if r is larger than min(out, in), or the weight is no
            matrix or not finite. Nothing is registered then.

    Paper:
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv 2409.05926.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(8, 4).requires_grad_(False)
        >>> _ = parametrize.register_parametrization(layer, "weight", SingularValues(3))
        >>> [(name, p.numel()) for name, p in layer.named_parameters() if p.requires_grad]
        [('parametrizations.weight.0.delta', 3)]
    """

    delta: nn.Parameter
    left: Tensor
    sigma: Tensor
    right: Tensor

    def __init__(
        self,
        r: Rank = None,
        *,
        energy: float = 0.99,
        energy_kind: EnergyKind = "squared",
        relative: bool = False,
        svd: SVDMethod = "auto",
    ) -> None:
        super().__init__()
        check_rank(r)
        check_energy(energy, energy_kind)
        self.r: Rank = r
        self.energy = energy
        self.energy_kind: EnergyKind = energy_kind
        self.relative = relative
        self.svd: SVDMethod = svd
        self.register_parameter("delta", None)

    def update(self) -> Tensor:
        """Return U diag(δ) Vᵀ, or with diag(σ δ) if `relative`, (out, rest)."""
        return (self.left * (self.delta * self.sigma if self.relative else self.delta)) @ self.right

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        return (weight.flatten(1) + self.update()).to(weight.dtype).view(weight.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the original of an assigned weight; the first time, at registration, the weight itself."""
        if self.delta is not None:
            return (weight.flatten(1) - self.update()).to(weight.dtype).view(weight.shape)
        if weight.ndim < 2:
            raise ValueError(
                f"SingularValues needs a weight of at least two dimensions, got {tuple(weight.shape)}"
            )
        triples = leading_triples(
            weight.flatten(1), self.r, energy=self.energy, energy_kind=self.energy_kind, svd=self.svd
        )
        for name, tensor in (("left", triples.left), ("sigma", triples.values), ("right", triples.right)):
            self.register_buffer(name, tensor)
        self.delta = nn.Parameter(torch.zeros_like(triples.values))
        return weight

    def extra_repr(self) -> str:
        """Show how many values train."""
        return f"r={self.r if self.delta is None else self.delta.numel()}, relative={self.relative}"


def check_rank(r: object) -> None:
    """Raise ValueError unless r is a `Rank`."""
    number = isinstance(r, int) and not isinstance(r, bool) and r >= 1
    if not (number or r is None or (isinstance(r, str) and r == "all")):
        raise ValueError(f'r={r!r} must be an integer of at least 1, "all", or None to choose by energy')
