"""Running the networks that are merged: a model whose weights are put in, with data if there are any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightlab.exceptions import UsageError, WeightlabError
from weightlab.merge.batch_norm_statistics import first_input, reset_batch_norm_
from weightlab.merge.interpolation import hill, interpolate, points_between
from weightlab.merge.permutation import evaluating


@dataclass(frozen=True)
class Bench:
    """What merging may use to run the networks.

    Attributes:
        model: A network of the files' architecture; its weights do not matter and are overwritten.
        example: Arguments of its forward pass, to find out which units move together.
        where: What the model is from, for messages.
        train: Batches for batch norm's statistics; empty if there are none.
        held_out: Batches that losses are taken on; empty if there are none.
        forward: How to run a batch.
        loss: `loss(model, batch)`, a mean over the batch. None: no losses.
        evaluate: Gives scores of a model, by name. None: no scores.
        data: What batches are from, for the report.
        names: Names in the model of tensors that have others in files.
    """

    model: nn.Module
    example: tuple[Any, ...]
    where: str
    train: Sequence[Any] = ()
    held_out: Sequence[Any] = ()
    forward: Callable[[nn.Module, Any], Any] = first_input
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    data: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, stored: str) -> str:
        """Name in the model of a tensor in a file."""
        return self.names.get(stored, stored)


def load_into(bench: Bench, state: Mapping[str, Tensor], path: str) -> None:
    """Put a network's tensors into the bench's model, which must be of the same architecture."""
    own = bench.model.state_dict()
    for stored, tensor in state.items():
        name = bench.name(stored)
        if name not in own or own[name].shape != tensor.shape:
            raise UsageError(
                f"{path} is not of the architecture of {bench.where}: {stored} has shape {tuple(tensor.shape)} in the file, "
                + (f"but {tuple(own[name].shape)} in the model" if name in own else "and is not in the model")
            )
    given = {bench.name(stored): tensor for stored, tensor in state.items()}
    places = {own[name].data_ptr() for name in given}
    for name, tensor in own.items():
        if name not in given and tensor.data_ptr() not in places:
            raise UsageError(
                f"{path} is not of the architecture of {bench.where}: {name}, of shape {tuple(tensor.shape)}, is in the "
                "model, and not in the file"
            )
    bench.model.load_state_dict(given, strict=False)


@contextlib.contextmanager
def running(bench: Bench) -> Iterator[None]:
    """Say in words what goes wrong when users' models run."""
    try:
        yield
    except WeightlabError:
        raise
    except Exception as error:  # It is the user's code.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"cannot run {bench.where}: {type(error).__name__}: {lines[0]}") from error


def line_losses(
    states: Sequence[Mapping[str, Tensor]],
    merged: Mapping[str, Tensor],
    aligned: Sequence[Mapping[str, Tensor]] | None,
    bench: Bench,
    *,
    points: int,
    with_reset: bool,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Losses of the networks, and on the line between two: as they are, matched, and with new statistics.

    Args:
        states: The networks.
        merged: What they were merged to.
        aligned: The networks after matching; None if there was none.
        bench: Runs them; has a loss and batches.
        points: How many points of the line, evenly spaced.
        with_reset: Whether to take batch norm's statistics anew at each point of a further line.
        tell: As in `merge_checkpoints`.

    Returns:
        In JSON types: `models`, `merged`, `data`; for two networks `lambdas` and, for each line, `barrier`, `at`, `losses`.
    """
    found: dict[str, Any] = {
        "data": bench.data,
        "models": [mean_loss(bench, s) for s in states],
        "merged": mean_loss(bench, merged),
    }
    if len(states) != 2:
        return found
    lines = [("before", states, False)]
    if aligned is not None:
        lines.append(("after", aligned, False))
    if with_reset:
        lines.append(("reset", states if aligned is None else aligned, True))
    lambdas = points_between(points)
    for row, (what, pair, reset) in enumerate(lines):
        heights = []
        for column, lam in enumerate(lambdas):
            tell("taking losses on the line", row * len(lambdas) + column, len(lines) * len(lambdas))
            heights.append(mean_loss(bench, interpolate(pair[0], pair[1], lam), reset=reset))
        curve = hill(lambdas, heights)
        found[what] = {"barrier": curve.barrier, "at": curve.at, "losses": [*curve.losses]}
    return {**found, "lambdas": lambdas}


def mean_loss(bench: Bench, state: Mapping[str, Tensor], *, reset: bool = False) -> float:
    """Mean loss of a network over the held-out batches, with batch norm's statistics taken anew if `reset`."""
    load_into(bench, state, "the model")
    assert bench.loss is not None
    total = count = 0.0
    with running(bench):
        if reset:
            reset_batch_norm_(bench.model, bench.train, forward=bench.forward)
        with evaluating(bench.model):
            for batch in bench.held_out:
                size = _rows(batch)
                total += float(bench.loss(bench.model, batch)) * size
                count += size
    return total / count


def _rows(batch: Any) -> int:
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
