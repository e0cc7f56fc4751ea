"""Principal components kept up to date batch by batch, without a covariance matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from weightlab.linalg.streaming_moments import RowStream


class IncrementalPCA(RowStream):
    r"""Leading principal components of rows that arrive in batches, by a small SVD for each.

    Stacks what is known, :math:`\operatorname{diag}(s) V`, on the centred batch and on one row for the
    difference between the means, and keeps the leading part of the SVD. What a step drops is lost, so for k < d
    the result depends on the batches and their order, the more the flatter the spectrum. With k = d, or where
    all but k directions vary little, it is exact.

    Unlike scikit-learn's and PEFT's, it takes batches of fewer than k rows, and its SVD is exact.

    Args:
        dim: Length d of a row.
        k: Components to keep track of, in [1, d].
        device: Where the state lives. Default None: torch's default.

    Attributes:
        scaled: diag(s) V, shape `(k, d)`, float64; rows of zeros until there are so many components.

    Raises:
        ValueError: If `dim` is less than 1 or `k` out of range.

    Complexity:
        The SVD of a matrix `(k + n + 1, d)` for a batch of n rows; 8·k·d bytes.

    References:
        Incremental Learning for Robust Visual Tracking, Ross, Lim, Lin and Yang, 2008.

    Example:
        >>> pca = IncrementalPCA(3, k=2)
        >>> for row in torch.tensor([[1.0, 0, 5], [-1, 0, 5], [0, 2, 5], [0, -2, 5]]):
        ...     pca = pca.update(row)
        >>> pca.principal(1).directions.round(decimals=6) + 0.0
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """

    _tensors = (*RowStream._tensors, "_total", "scaled")

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        super().__init__(dim, device)
        self._check_k(k)
        self._total = torch.zeros((), dtype=self._wide, device=device)
        self.scaled = torch.zeros(k, dim, dtype=self._wide, device=device)

    @property
    def total(self) -> Tensor:
        """Sum of squared distances from the mean."""
        return self._total

    def _check_k(self, k: int) -> None:
        super()._check_k(k)
        if hasattr(self, "scaled") and k > len(self.scaled):
            raise ValueError(f"k must be at most {len(self.scaled)}, the components kept track of, got {k}")

    def _summary(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.square().sum(dtype=self._wide), rows

    def _absorb(self, summary: tuple[Tensor, ...], shift: Tensor) -> None:
        total, rows = summary
        self._total = self._total + total + shift.square().sum()
        more = torch.cat([rows.to(self._wide), shift[None]])
        # Of what is not finite, `total` tells when components are asked for; the SVD would raise.
        if not bool(more.isfinite().all()):
            return
        values, directions = self._svd(more)
        kept = min(len(values), len(self.scaled))
        self.scaled = torch.zeros_like(self.scaled)
        self.scaled[:kept] = values[:kept, None] * directions[:kept]

    def _decompose(self, k: int, center: bool) -> tuple[Tensor, Tensor]:
        more = self.mean[None] * (0.0 if center else self.count**0.5)
        values, directions = self._svd(more)
        # Few rows have fewer directions than k: any that are orthogonal to them complete the basis.
        if len(values) < k:
            values = torch.nn.functional.pad(values, (0, k - len(values)))
            directions = torch.linalg.svd(directions, full_matrices=True).Vh
        return values[:k].square(), directions[:k]

    def _svd(self, more: Tensor) -> tuple[Tensor, Tensor]:
        _, values, directions = torch.linalg.svd(torch.cat([self.scaled, more]), full_matrices=False)
        return values, directions
