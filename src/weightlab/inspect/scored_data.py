"""The scores of a data set's examples, with what they were made from."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.jupyter import JupyterMixin
from rich.table import Table
from torch import Tensor

from weightlab._lazy import require
from weightlab._pages.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 10


@dataclass(frozen=True, eq=False)
class DataScores(JupyterMixin):
    """How hard each example of a data set is: the larger the score, the harder.

    Attributes:
        name: Which score.
        per_run: Scores by run, float32 `(runs, N)`, in the data set's order.
        targets: The labels, int64 `(N,)`.
        probabilities: What the runs' models give each class at the end, on average, float32 `(N, K)`.

    Example:
        >>> scores = DataScores("el2n", torch.tensor([[0.1, 1.2, 0.2]]), torch.tensor([0, 0, 1]),
        ...                     torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.2, 0.8]]))
        >>> scores.order(), scores.rank(), scores.predicted
        (tensor([1, 2, 0]), tensor([3, 1, 2]), tensor([0, 1, 1]))
        >>> scores.suspicion
        tensor([0.0000, 0.8000, 0.0000])
    """

    name: str
    per_run: Tensor
    targets: Tensor
    probabilities: Tensor

    def __post_init__(self) -> None:
        if self.per_run.ndim != 2 or 0 in self.per_run.shape:
            raise ValueError(f"per_run must be (runs, N), neither of them 0, got {tuple(self.per_run.shape)}")
        n = self.per_run.shape[1]
        if self.targets.shape != (n,) or self.probabilities.ndim != 2 or len(self.probabilities) != n:
            raise ValueError(
                f"targets must be ({n},) and probabilities ({n}, K), "
                f"got {tuple(self.targets.shape)} and {tuple(self.probabilities.shape)}"
            )

    @property
    def scores(self) -> Tensor:
        """Means over the runs, float32 `(N,)`. Infinite where a run's is: an example that it never learned."""
        return self.per_run.double().mean(0).float()

    @property
    def predicted(self) -> Tensor:
        """The class that the models find likeliest, int64 `(N,)`."""
        return self.probabilities.argmax(-1)

    @property
    def margin(self) -> Tensor:
        """How far the likeliest other class is ahead of the label, float32 `(N,)` in [−1, 1]."""
        own = self.targets[:, None]
        others = self.probabilities.scatter(1, own, -torch.inf).amax(-1)
        return others - self.probabilities.gather(1, own)[:, 0]

    @property
    def suspicion(self) -> Tensor:
        """How much speaks for a wrong label, float32 `(N,)` in [0, 1].

        The margin of the class predicted instead, times the share of examples that have no higher score; 0 where the
        label is predicted.
        """
        n = len(self.targets)
        return self.margin.clamp(min=0) * (1 - (self.rank() - 1).float() / n)

    def order(self) -> Tensor:
        """Return the indices from the hardest to the easiest example, int64 `(N,)`; ties as in `select`."""
        return self.scores.argsort(stable=True).flip(0)

    def rank(self) -> Tensor:
        """Return each example's place in `order`, 1 for the hardest, int64 `(N,)`."""
        order = self.order()
        return torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1))

    def agreement(self) -> float:
        """Return how well one run foretells the others: Spearman's correlation of each with the mean of the rest.

        The mean over runs; NaN for a single one. Low values ask for more runs.
        """
        runs = len(self.per_run)
        if runs == 1:
            return float("nan")
        rest = torch.stack([self.per_run[torch.arange(runs) != run].double().mean(0) for run in range(runs)])
        pairs = zip(self.per_run, rest, strict=True)
        return sum(rank_correlation(run, others) for run, others in pairs) / runs

    def table(self, rows: int = _SHOWN) -> Table:
        """Return a rich table of the hardest examples.

        Args:
            rows: How many.
        """
        table = Table(title=f"hardest of {len(self.targets):,} examples by {self.name}", title_justify="left")
        for column in ("rank", "index", self.name, "label", "predicted", "margin", "suspicion"):
            table.add_column(column, justify="right")
        scores, predicted, margin, suspicion = self.scores, self.predicted, self.margin, self.suspicion
        for place, index in enumerate(self.order()[:rows].tolist(), 1):
            table.add_row(
                str(place),
                str(index),
                f"{float(scores[index]):.4g}",
                str(int(self.targets[index])),
                str(int(predicted[index])),
                f"{float(margin[index]):.3f}",
                f"{float(suspicion[index]):.3f}",
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return a line an example, the hardest first, and write it to `path` if given.

        Columns: index, score, rank, label, predicted, margin, suspicion. Floats have all their digits, `inf` is one.

        Raises:
            WeightlabError: If the file cannot be written; what was there stays.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("index", "score", "rank", "label", "predicted", "margin", "suspicion"))
        order = self.order()
        columns = (self.scores, self.targets, self.predicted, self.margin, self.suspicion)
        score, label, predicted, margin, suspicion = (column[order].tolist() for column in columns)
        ranks = range(1, len(order) + 1)
        writer.writerows(zip(order.tolist(), score, ranks, label, predicted, margin, suspicion, strict=True))
        if path is not None:
            write_text(path, text.getvalue())
        return text.getvalue()

    def plot(self) -> Figure:
        """Draw the scores from the hardest to the easiest, with the lowest and highest of the runs.

        Returns:
            A `matplotlib.figure.Figure`; save it with `savefig`.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        figure: Figure = require("matplotlib.figure", "trial").Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        order = self.order()
        runs = torch.where(self.per_run.isfinite(), self.per_run, torch.nan)[:, order]
        places = torch.arange(1, len(order) + 1)
        if len(runs) > 1:
            low, high = (part.numpy() for part in (runs.amin(0), runs.amax(0)))
            axes.fill_between(places, low, high, alpha=0.2, linewidth=0, label="lowest and highest run")
        axes.plot(places, torch.where(self.scores.isfinite(), self.scores, torch.nan)[order], label="mean")
        axes.set(xlabel="examples, hardest first", ylabel=self.name)
        axes.legend(fontsize=8)
        return figure


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two scores `(N,)`, ties with their mean rank; NaN if one is constant.

    Example:
        >>> first, second = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([0.0, 5.0, 3.0, torch.inf])
        >>> round(rank_correlation(first, second), 6)
        0.8
    """
    ranks = torch.stack([_mean_ranks(first), _mean_ranks(second)])
    ranks -= ranks.mean(1, keepdim=True)
    return float((ranks[0] * ranks[1]).sum() / ranks.norm(dim=1).prod())


def _mean_ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[place]
