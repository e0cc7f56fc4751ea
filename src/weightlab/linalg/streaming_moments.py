"""Second moments of rows that arrive in batches, and the principal components they give."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from weightlab.linalg.symmetric_products import gram

if TYPE_CHECKING:
    from typing import Self

    from torch.distributed import ProcessGroup


class PrincipalComponents(NamedTuple):
    """Leading principal components of rows.

    Attributes:
        directions: Shape `(k, d)`: orthonormal rows in the order of their singular values, each with its
            entry of largest magnitude positive.
        singular_values: Shape `(k,)`: those of the matrix of all rows, centred or not; descending. Sample
            variances are their squares over the count less one.
        ratios: Shape `(k,)`: shares of the total of squares; zeros where all rows are alike.
    """

    directions: Tensor
    singular_values: Tensor
    ratios: Tensor


class RowStream(ABC):
    """Count and mean of rows that arrive in batches, and a summary of how they vary around it.

    Each batch is centred by its own mean, and batches are joined by the exact formula for joined means, so
    that a large common mean costs no precision. What is added up is float64, products are in the rows'
    type and at least float32.

    Attributes:
        dim: Length d of a row.
        count: Rows so far.
        mean: Their mean, shape `(d,)`, float64; zeros before the first.
    """

    _tensors: ClassVar[tuple[str, ...]] = ("mean",)

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.count = 0
        # Apple's accelerator has no float64.
        self._wide = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64
        self.mean = torch.zeros(dim, dtype=self._wide, device=device)

    @torch.no_grad()
    def update(self, rows: Tensor) -> Self:
        """Take in a batch.

        Args:
            rows: Shape `(..., d)`, floating point; leading dimensions are flattened. May be empty.

        Returns:
            This object.

        Raises:
            TypeError: If `rows` is not a real floating-point tensor.
            ValueError: If its last dimension is not d.
        """
        if not rows.is_floating_point():
            raise TypeError(f"rows must be a real floating-point tensor, got {rows.dtype}")
        if rows.ndim == 0 or rows.shape[-1] != self.dim:
            raise ValueError(f"rows must have shape (..., {self.dim}), got {tuple(rows.shape)}")
        rows = rows.detach().reshape(-1, self.dim)
        if len(rows) == 0:
            return self
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean = rows.mean(0)
        rows = rows - mean
        # What rounding left of the mean is small, so it is found to all digits.
        exact = mean.to(self._wide) + rows.mean(0).to(self._wide)
        self._join(len(rows), exact, self._summary(rows))
        return self

    @torch.no_grad()
    def merge(self, other: Self) -> Self:
        """Take in what another object of the same kind has seen; the other one stays as it is.

        Returns:
            This object.

        Raises:
            ValueError: If the other one has other sizes.
        """
        if self._sizes() != other._sizes():
            raise ValueError(f"cannot merge {other._sizes()} into {self._sizes()}; sizes must be the same")
        device = self.mean.device
        summary = tuple(part.to(device) for part in other._parts())
        self._join(other.count, other.mean.to(device), summary)
        return self

    def all_reduce(self, group: ProcessGroup | None = None) -> Self:
        """Merge what all processes of a group have seen, in the order of their ranks, into each of them.

        Every process ends with the same bits.

        Args:
            group: Default None: all processes.

        Returns:
            This object.
        """
        import torch.distributed as dist

        world = dist.get_world_size(group)
        gathered: list[dict[str, Tensor]] = [{} for _ in range(world)]
        for name, tensor in self.state_dict().items():
            tensor = tensor.to(self.mean.device).contiguous()
            pieces = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(pieces, tensor, group=group)
            for state, piece in zip(gathered, pieces, strict=True):
                state[name] = piece
        self.load_state_dict(gathered[0])
        for state in gathered[1:]:
            other = copy.copy(self)
            other.load_state_dict(state)
            self.merge(other)
        return self

    @torch.no_grad()
    def principal(self, k: int, *, center: bool = True) -> PrincipalComponents:
        """Return the leading principal components of all rows so far.

        Args:
            k: How many.
            center: Whether around the mean, as usual, or around zero. Default True.

        Returns:
            float64 tensors.

        Raises:
            ValueError: If k is not in [1, d] (or is more than are kept track of), there were no rows, or
                they hold values that are not finite or whose squares are not.
        """
        self._check_k(k)
        if self.count == 0:
            raise ValueError("there are no principal components of no rows; update with some first")
        total = self.total if center else self.total + self.count * self.mean.square().sum()
        if not math.isfinite(total.item()):
            raise ValueError("rows hold values that are not finite, or too large to be squared in their type")
        values, directions = self._decompose(k, center)
        places = directions.abs().argmax(-1, keepdim=True)
        directions = directions * directions.gather(-1, places).sign()
        # Rounding may leave a little less than nothing.
        values = values.clamp(min=0)
        ratios = torch.where(total > 0, values / total, 0.0)
        return PrincipalComponents(directions, values.sqrt(), ratios)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all there is to keep, as tensors."""
        count = torch.tensor(self.count, dtype=torch.int64)
        return {"count": count, **{name: getattr(self, name).clone() for name in self._tensors}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what another object's `state_dict` held.

        Raises:
            ValueError: If names or shapes are not this object's.
        """
        if set(state) != {"count", *self._tensors}:
            raise ValueError(f"state must hold {['count', *self._tensors]}, got {sorted(state)}")
        for name in self._tensors:
            if state[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} in the state has shape {tuple(state[name].shape)}, "
                    f"this object needs {tuple(getattr(self, name).shape)}"
                )
        self.count = int(state["count"])
        for name in self._tensors:
            old = getattr(self, name)
            setattr(self, name, state[name].to(old.device, old.dtype, copy=True))

    def _join(self, count: int, mean: Tensor, summary: tuple[Tensor, ...]) -> None:
        """Join rows of which count, mean and summary are known."""
        joined = self.count + count
        if count == 0:
            return
        difference = mean - self.mean
        shift = difference * math.sqrt(self.count * count / joined)
        self._absorb(summary, shift)
        self.mean = self.mean + difference * (count / joined)
        self.count = joined

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.dim:
            raise ValueError(f"k must be in [1, {self.dim}], the length of the rows, got {k}")

    def _sizes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(getattr(self, name).shape) for name in self._tensors)

    def _parts(self) -> tuple[Tensor, ...]:
        """The summary of all rows so far, in the form of `_summary`."""
        return tuple(getattr(self, name) for name in self._tensors if name != "mean")

    @property
    @abstractmethod
    def total(self) -> Tensor:
        """Sum of squared distances from the mean, 0-dimensional, float64."""

    @abstractmethod
    def _summary(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Summarise centred rows `(n, d)`."""

    @abstractmethod
    def _absorb(self, summary: tuple[Tensor, ...], shift: Tensor) -> None:
        """Add a summary, and the one more centred row that stands for the difference between the means."""

    @abstractmethod
    def _decompose(self, k: int, center: bool) -> tuple[Tensor, Tensor]:
        """Return k leading eigenvalues and eigenvectors, as rows, of the matrix of squares and products."""


class StreamingMoments(RowStream):
    r"""Mean and covariance of rows that arrive in batches, exact whatever the batches and their order.

    Keeps :math:`\sum_i (x_i - \bar x)(x_i - \bar x)^\top`. Two such states merge into the one that all rows
    together would have given, so processes exchange d² numbers rather than rows.

    Args:
        dim: Length d of a row.
        device: Where the state lives. Default None: torch's default.

    Attributes:
        scatter: Sum of products of deviations from the mean, shape `(d, d)`, float64.

    Raises:
        ValueError: If `dim` is less than 1.

    Complexity:
        `2·n·d²` flops for n rows (5/8 of them on a CPU with d ≥ 512) and one pass over d² numbers a
        batch; 8·d² bytes. `principal` takes one eigendecomposition, `4/3·d³` flops and
        upwards. For rows longer
        than some thousands, see `MomentSketch`.

    References:
        Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, Chan, Golub and
        LeVeque, 1979.

    Example:
        >>> moments = StreamingMoments(2).update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.update(torch.tensor([[5.0, 3.0]])).mean.tolist()
        [3.0, 1.0]
        >>> moments.covariance().round(decimals=6)
        tensor([[4., 3.],
                [3., 3.]], dtype=torch.float64)
    """

    _tensors = (*RowStream._tensors, "scatter")

    def __init__(self, dim: int, device: torch.device | str | None = None) -> None:
        super().__init__(dim, device)
        self.scatter = torch.zeros(dim, dim, dtype=self._wide, device=device)

    @property
    def total(self) -> Tensor:
        """Sum of squared distances from the mean."""
        return self.scatter.trace()

    def covariance(self, *, center: bool = True, correction: int = 1) -> Tensor:
        """Return the matrix of covariances, or of mean products.

        Args:
            center: Whether around the mean, or around zero. Default True.
            correction: Taken off the count to divide by. Default 1, as in `torch.cov`.

        Returns:
            Shape `(d, d)`, float64.

        Raises:
            ValueError: If there are no more rows than `correction`.
        """
        if self.count <= correction:
            raise ValueError(f"a covariance needs more than {correction} rows, got {self.count}")
        return self._products(center) / (self.count - correction)

    def _products(self, center: bool) -> Tensor:
        return self.scatter if center else self.scatter + self.count * self.mean.outer(self.mean)

    def _summary(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (gram(rows.mT),)

    def _absorb(self, summary: tuple[Tensor, ...], shift: Tensor) -> None:
        self.scatter += summary[0]
        if self.count:
            self.scatter.addr_(shift, shift)

    def _decompose(self, k: int, center: bool) -> tuple[Tensor, Tensor]:
        products = self._products(center)
        if products.device.type == "cpu" and 2 * k < self.dim:
            # LAPACK's way for some eigenvectors only, which torch does not offer, takes a third of the time.
            from scipy.linalg import eigh

            found = eigh(products.numpy(), subset_by_index=(self.dim - k, self.dim - 1), check_finite=False)
            values, vectors = map(torch.from_numpy, found)
        else:
            values, vectors = torch.linalg.eigh(products)
        return values[-k:].flip(0), vectors[:, -k:].flip(1).mT
