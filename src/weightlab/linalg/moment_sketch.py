"""Principal components of long rows from a random projection of their covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from weightlab.linalg.streaming_moments import RowStream


class MomentSketch(RowStream):
    r"""Leading principal components of rows too long for a matrix of covariances.

    Keeps :math:`Y = C \Omega`, C the sum of products of deviations from the mean and Ω an orthonormal `(d, l)`
    drawn once from a fixed seed. Y adds up over rows, so order and batches do not matter and states merge. The
    components are those of Nyström's :math:`Y (\Omega^\top Y)^+ Y^\top`. They are as good as C is close to rank
    l: ask for few of a spectrum that decays, and for wide sketches of one that is flat. Variances come out too small, never
    too large.

    Args:
        dim: Length d of a row.
        k: Components that will be asked for, in [1, d].
        width: Columns l of the sketch. Default None: 2k + 16. At d it is exact, and no less than `StreamingMoments`.
        device: Where the state lives. Default None: torch's default.

    Attributes:
        sketch: Y, shape `(d, l)`, float64.

    Raises:
        ValueError: If `dim` is less than 1, `k` out of range or `width` below it.

    Complexity:
        `4·n·d·l` flops for n rows; 12·d·l bytes. `principal` takes the SVD of a matrix `(d, l)`.

    References:
        Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming Data, arXiv 1706.05736.

    Example:
        >>> rows = torch.tensor([[1.0, 0, 5], [-1, 0, 5], [0, 2, 5], [0, -2, 5]])
        >>> MomentSketch(3, k=1).update(rows).principal(1).directions.round(decimals=6) + 0.0
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """

    _tensors = (*RowStream._tensors, "_total", "sketch")

    def __init__(
        self, dim: int, k: int, *, width: int | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__(dim, device)
        self._check_k(k)
        if width is not None and width < k:
            raise ValueError(f"width must be at least k = {k}, got {width}")
        width = min(dim, 2 * k + 16 if width is None else width)
        drawn = torch.randn(dim, width, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
        self._probes = torch.linalg.qr(drawn).Q.to(device=device, dtype=torch.float32)
        self._total = torch.zeros((), dtype=self._wide, device=device)
        self.sketch = torch.zeros(dim, width, dtype=self._wide, device=device)

    @property
    def total(self) -> Tensor:
        """Sum of squared distances from the mean."""
        return self._total

    def _check_k(self, k: int) -> None:
        super()._check_k(k)
        if hasattr(self, "sketch") and k > self.sketch.shape[1]:
            raise ValueError(f"k must be at most {self.sketch.shape[1]}, the width of the sketch, got {k}")

    def _summary(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.square().sum(dtype=self._wide), rows.mT @ (rows @ self._probes.to(rows.dtype))

    def _absorb(self, summary: tuple[Tensor, ...], shift: Tensor) -> None:
        total, products = summary
        self._total = self._total + total + shift.square().sum()
        self.sketch += products
        if self.count:
            self.sketch.addr_(shift, shift @ self._probes.to(self._wide))

    def _decompose(self, k: int, center: bool) -> tuple[Tensor, Tensor]:
        probes = self._probes.to(self._wide)
        Y = self.sketch if center else self.sketch + self.count * self.mean.outer(self.mean @ probes)
        core = probes.mT @ Y
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        # What rounding in float32 products leaves where there is nothing must not be divided by.
        floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float32).eps
        inverse = torch.where(values > floor, values.clamp(min=floor).rsqrt(), 0.0)
        factor = Y @ (vectors * torch.where(inverse.isfinite(), inverse, 0.0))
        U, roots, _ = torch.linalg.svd(factor, full_matrices=False)
        return roots[:k].square(), U[:, :k].mT
