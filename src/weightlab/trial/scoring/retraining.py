"""Training anew without some of the examples, against a random choice and against all of them, at equal steps."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weightlab._pages.files import write_text
from weightlab.exceptions import UsageError
from weightlab.inspect import select
from weightlab.inspect.example_training import (
    ExampleReader,
    derived_seed,
    evaluating,
    seeded,
    sgd,
    steps_in,
    train,
)
from weightlab.inspect.scoring import Tell
from weightlab.trial.scoring.sources import Source
from weightlab.trial.statistics import Interval, PairedMean

ALL, HARDEST, RANDOM, OFFSET = "all", "hardest", "random", "hardest but the top"
EVALUATION_BATCH = 500
LEVEL = 0.95


@dataclass(frozen=True)
class Choice:
    """What to train on.

    Attributes:
        how: `ALL`, `HARDEST`, `RANDOM` or `OFFSET`.
        pruned: Share of the examples that is left out.
        offset: Share of the examples, the hardest, that is among those.
    """

    how: str
    pruned: float = 0.0
    offset: float = 0.0

    @property
    def way(self) -> str:
        """How it is chosen, in words."""
        return f"{OFFSET} {100 * self.offset:g} %" if self.how == OFFSET else self.how

    @property
    def name(self) -> str:
        """What it is called."""
        return ALL if self.how == ALL else f"{self.way}, {100 * self.pruned:g} % pruned"

    def indices(self, scores: Tensor, seed: int) -> Tensor:
        """Return the examples that are left."""
        if self.how == ALL:
            return torch.arange(len(scores))
        keep = len(scores) - round(self.pruned * len(scores))
        if keep < 1:
            raise UsageError(f"pruning {100 * self.pruned:g} % of {len(scores)} examples leaves none")
        if self.how == RANDOM:
            return select(scores, keep, "random", generator=torch.Generator().manual_seed(seed))
        return select(
            scores, keep, "offset", offset=min(round(self.offset * len(scores)), len(scores) - keep)
        )


@dataclass(frozen=True)
class Retrained:
    """What came of one choice.

    Attributes:
        choice: The choice.
        examples: How many were trained on.
        errors: Test errors, one a seed.
        error: Their mean.
        interval: 95 % interval of the mean.
        to_all: Mean difference of errors to those of all examples, paired by seed, with its interval.
        to_random: The same to a random choice of equal size; `None` for that choice itself and for all.
    """

    choice: Choice
    examples: int
    errors: tuple[float, ...]
    error: float
    interval: Interval
    to_all: tuple[float, Interval] | None
    to_random: tuple[float, Interval] | None


@dataclass(frozen=True)
class Recipe:
    """How to retrain.

    Attributes:
        pruned: Shares to leave out.
        offset: Share of the hardest examples that a further choice leaves out too; 0 for no such choice.
        seeds: Trainings of each choice.
        epochs: As many steps as these passes over all examples take.
        batch_size: Examples in a batch.
        lr: Peak learning rate, annealed to 0 along a cosine.

    Raises:
        UsageError: If a value is out of range.
    """

    pruned: tuple[float, ...]
    offset: float = 0.0
    seeds: int = 5
    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.05

    def __post_init__(self) -> None:
        for share in self.pruned:
            if not 0 < share < 1:
                raise UsageError(
                    f"--retrain takes shares to leave out, above 0 and below 1, e.g. 0.3,0.5; got {share:g}"
                )
        if not 0 <= self.offset < 1 or any(self.offset and self.offset > share for share in self.pruned):
            raise UsageError(
                f"--offset must be a share that is not above any in --retrain; got {self.offset:g}"
            )
        for name in ("seeds", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('epochs', 'retrain-epochs')} must be at least 1; got {getattr(self, name)}"
                )

    def choices(self) -> list[Choice]:
        """Return what is trained on, all examples first."""
        found = [Choice(ALL)]
        for share in sorted(set(self.pruned)):
            found += [Choice(HARDEST, share), Choice(RANDOM, share)]
            found += [Choice(OFFSET, share, self.offset)] if self.offset else []
        return found

    def steps(self, examples: int) -> int:
        """Return the optimizer steps of every training."""
        return self.epochs * steps_in(examples, self.batch_size)


def retrain(
    source: Source,
    scores: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    kept: Path,
    tell: Tell,
) -> list[Retrained]:
    """Train new models on parts of the examples, and test them.

    Every training takes the same number of steps with the same learning rate. Seed k gives all choices the same initial
    weights.

    Args:
        source: Examples with a test set.
        scores: The larger, the harder, `(N,)`.
        recipe: What to do.
        seed: Decides everything random.
        device: Where to compute.
        kept: File to which each result goes when it is there, and from which those that are there are taken.
        tell: Called after each step with how many are done, of how many, and what is going on.

    Raises:
        UsageError: If there is no test set, or too little is left to train on.
        WeightlabError: If a loss stops being finite.
    """
    if source.test is None:
        raise UsageError(
            f"{source.name} has no test set, which --retrain needs (x_test and y_test, or --test-split)"
        )
    choices, steps = recipe.choices(), recipe.steps(len(source.labels))
    results = _Results(kept)
    jobs = [(number, choice) for number in range(recipe.seeds) for choice in choices]
    for place, (number, choice) in enumerate(jobs):
        if results.of(choice, number) is None:
            error = _error_after(
                source,
                choice.indices(scores, derived_seed(seed, 7, number)),
                recipe,
                seed=derived_seed(seed, 8, number),
                device=device,
                tell=functools.partial(_told, tell, place, len(jobs), steps, f"retraining on {choice.name}"),
            )
            results.add(choice, number, error)
        tell((place + 1) * steps, len(jobs) * steps, f"retraining on {choice.name}")
    errors = {
        choice: [results.errors[choice.name, number] for number in range(recipe.seeds)] for choice in choices
    }
    return [_summarised(choice, errors, len(choice.indices(scores, 0))) for choice in choices]


def _told(tell: Tell, place: int, jobs: int, steps: int, message: str, step: int) -> None:
    tell(place * steps + step, jobs * steps, message)


def _error_after(
    source: Source,
    indices: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    tell: Callable[[int], None],
) -> float:
    """Train on the examples and return the share of the test set that is classified wrongly."""
    count = itertools.count(1)
    with seeded(derived_seed(seed, 0), device):
        model = source.build().to(device)
    train(
        model,
        ExampleReader((source.inputs, source.labels)),
        sgd(model, recipe.lr),
        indices=indices,
        steps=recipe.steps(len(source.labels)),
        batch_size=recipe.batch_size,
        seed=derived_seed(seed, 1),
        device=device,
        augment=source.augment,
        anneal=True,
        tick=lambda: tell(next(count)),
    )
    assert source.test is not None
    inputs, labels = source.test
    wrong = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(inputs.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            wrong += int((model(x.to(device)).argmax(-1).cpu() != y).sum())
    return wrong / len(labels)


def _summarised(choice: Choice, errors: Mapping[Choice, Sequence[float]], examples: int) -> Retrained:
    own = errors[choice]
    random = Choice(RANDOM, choice.pruned)
    return Retrained(
        choice=choice,
        examples=examples,
        errors=tuple(own),
        error=statistics.fmean(own),
        interval=PairedMean(own).interval(LEVEL),
        to_all=None if choice.how == ALL else _difference(own, errors[Choice(ALL)]),
        to_random=None if choice.how in (ALL, RANDOM) else _difference(own, errors[random]),
    )


def _difference(own: Sequence[float], other: Sequence[float]) -> tuple[float, Interval]:
    estimate = PairedMean([a - b for a, b in zip(own, other, strict=True)])
    return estimate.mean, estimate.interval(LEVEL)


class _Results:
    """Errors by choice and seed, in a file of a JSON line each. A last line that was cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: dict[tuple[str, int], float] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = json.loads(line)
                    self.errors[row["choice"], row["seed"]] = float(row["error"])

    def of(self, choice: Choice, seed: int) -> float | None:
        return self.errors.get((choice.name, seed))

    def add(self, choice: Choice, seed: int, error: float) -> None:
        self.errors[choice.name, seed] = error
        rows = [
            {"choice": name, "seed": number, "error": value} for (name, number), value in self.errors.items()
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
