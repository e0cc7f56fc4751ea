"""Scores of all examples of a data set, by small models trained for the purpose."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from weightlab.exceptions import WeightlabError
from weightlab.inspect.area_under_margin import AreaUnderMargin
from weightlab.inspect.example_scores import el2n, example_loss, prediction_margin
from weightlab.inspect.example_tracker import ExampleTracker
from weightlab.inspect.example_training import (
    Augment,
    Data,
    ExampleReader,
    derived_seed,
    evaluating,
    seeded,
    sgd,
    steps_in,
    to_device,
    train,
)
from weightlab.inspect.forgetting import ForgettingTracker
from weightlab.inspect.gradient_norms import grad_norms
from weightlab.inspect.scored_data import DataScores

Score = Literal["el2n", "grand", "forgetting", "margin", "loss", "aum"]
Tell = Callable[[int, int, str], None]

SCORES: dict[str, str] = {
    "el2n": "norm of the error, softmax minus label",
    "grand": "norm of the loss's gradient by all weights",
    "forgetting": "times that training forgot the example",
    "margin": "lead of the likeliest other class over the label",
    "loss": "cross-entropy",
    "aum": "area under the margin, negated",
}
"""What `data_scores` can say of an example, each in a few words."""

_TRACKERS: dict[str, type[ExampleTracker]] = {"forgetting": ForgettingTracker, "aum": AreaUnderMargin}
_LOGITS = {"el2n": el2n, "margin": prediction_margin, "loss": example_loss}


def score_examples(
    model: nn.Module,
    dataset: Data,
    score: Sequence[Score] = ("el2n",),
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    workers: int = 0,
) -> dict[str, Tensor]:
    """Score the examples of a data set by a model as it is.

    The model is used in evaluation mode, and is left as it was: weights, gradients, running statistics and modes.

    Args:
        model: Gives logits `(B, K)` for a batch of inputs.
        dataset: As for [`data_scores`][weightlab.inspect.data_scores].
        score: Of `"el2n"`, `"grand"`, `"margin"` and `"loss"`.
        batch_size: Examples at once.
        device: Where to send the inputs. Default: to the model's first parameter.
        workers: Processes that load a data set's examples.

    Returns:
        Score -> float32 `(N,)` on the CPU, in the data set's order; and `"probabilities"` `(N, K)`, `"targets"`
        `(N,)`.

    Raises:
        TypeError: If the data are of another kind.
        ValueError: If a score is unknown, the data are empty or random, a label is out of range, or logits are not
            finite.

    Example:
        >>> inputs, targets = torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 2, 2])
        >>> score_examples(nn.Linear(3, 3), (inputs, targets))["el2n"].shape
        torch.Size([6])
    """
    wanted = _known(score)
    if trackers := [name for name in wanted if name in _TRACKERS]:
        raise ValueError(f"{trackers[0]} is a score of a whole training; data_scores has it")
    reader = ExampleReader(dataset, workers)
    reader.check_same_twice()
    place = device or next((parameter.device for parameter in model.parameters()), "cpu")
    return _evaluate(
        model, reader, wanted, _positive("batch_size", batch_size), torch.device(place), _no_tick
    )


@overload
def data_scores(
    model_fn: Callable[[], nn.Module],
    dataset: Data,
    score: Score = ...,
    *,
    runs: int = ...,
    epochs: int = ...,
    batch_size: int = ...,
    lr: float = ...,
    optimizer: Callable[[nn.Module], Optimizer] | None = ...,
    augment: Augment | None = ...,
    training_view: Data | None = ...,
    seed: int = ...,
    device: torch.device | str = ...,
    workers: int = ...,
    folder: str | os.PathLike[str] | None = ...,
    tell: Tell | None = ...,
) -> DataScores: ...


@overload
def data_scores(
    model_fn: Callable[[], nn.Module],
    dataset: Data,
    score: Sequence[Score],
    *,
    runs: int = ...,
    epochs: int = ...,
    batch_size: int = ...,
    lr: float = ...,
    optimizer: Callable[[nn.Module], Optimizer] | None = ...,
    augment: Augment | None = ...,
    training_view: Data | None = ...,
    seed: int = ...,
    device: torch.device | str = ...,
    workers: int = ...,
    folder: str | os.PathLike[str] | None = ...,
    tell: Tell | None = ...,
) -> dict[str, DataScores]: ...


def data_scores(
    model_fn: Callable[[], nn.Module],
    dataset: Data,
    score: Score | Sequence[Score] = "el2n",
    *,
    runs: int = 10,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.05,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    augment: Augment | None = None,
    training_view: Data | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
    folder: str | os.PathLike[str] | None = None,
    tell: Tell | None = None,
) -> DataScores | dict[str, DataScores]:
    """Score how hard each example of a data set is, by training small models on it for a few epochs.

    Each run trains a new model from other initial weights and in another order, by cross-entropy, and scores all
    examples at its end, in evaluation mode; the scores' means over the runs count. Several scores come out of the same
    runs:

    - `"el2n"`: ‖softmax(z) − onehot(y)‖₂, [`el2n`][weightlab.inspect.el2n];
    - `"grand"`: norm of the gradient of the example's loss by all parameters,
      [`grad_norms`][weightlab.inspect.grad_norms];
    - `"margin"`: [`prediction_margin`][weightlab.inspect.prediction_margin];
    - `"loss"`: [`example_loss`][weightlab.inspect.example_loss];
    - `"forgetting"`: events along the training, [`ForgettingTracker`][weightlab.inspect.ForgettingTracker]; wants
      long training;
    - `"aum"`: minus the [area under the margin][weightlab.inspect.AreaUnderMargin], so that the larger is the harder.

    Args:
        model_fn: Makes a model that gives logits `(B, K)`; called once a run, with PyTorch's random numbers seeded.
        dataset: What to score: inputs and classes as a pair of tensors `(N, ...)`, `(N,)`, or a map-style data set of
            pairs (input, class). It must give an example the same way each time.
        score: One score, or several.
        runs: Models to train. Default: the paper's.
        epochs: Passes over the data before scoring. Default: the start of the range (10 to 20 of 200 epochs) that the
            paper uses for EL2N on CIFAR-10; small data sets need fewer.
        batch_size: Examples in a batch. Default: the official code's.
        lr: Learning rate, constant. Default: half the official code's, whose models are normalised.
        optimizer: Makes another optimizer of a model. Default: SGD with the learning rate, Nesterov momentum 0.9 and
            weight decay 5e-4, the official code's.
        augment: Changes a batch of training inputs at random, `augment(inputs, generator)`; for pairs of tensors.
        training_view: The same examples in the same order with random augmentation, to train on.
        seed: Decides everything random: equal arguments give equal scores.
        device: Where to compute.
        workers: Processes that load a data set's examples.
        folder: Keeps each run when it ends, and takes up what is there already: a call that was broken off goes on.
            Model, optimizer and data must be the same then.
        tell: Called after each batch with how many are done, of how many, and what is going on.

    Returns:
        The scores, in the data set's order whatever the order of training; a dict by name if several were asked for.

    Warns:
        UserWarning: With `epochs=0`. That EL2N or GraNd of untrained networks say which examples matter is not
            reproducible (arXiv 2303.14753): they follow the norm of the input.

    Raises:
        TypeError: If the data are of another kind.
        ValueError: If an argument is out of range, the data are empty or random, `model_fn` gives the same model
            twice, a label is out of range, or `folder` holds runs with other settings.
        WeightlabError: If a loss stops being finite, or a run cannot be kept.

    Complexity:
        `runs` trainings of `epochs` epochs and one pass forward (for `"grand"`, and backward). Memory: `(runs + K) N`
        floats a score beside the model.

    References:
        Deep Learning on a Data Diet: Finding Important Examples Early in Training, arXiv 2107.07075.

    Example:
        >>> inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> targets = (inputs[:, 0] > 0).long()
        >>> targets[7] = 1 - targets[7]
        >>> scores = data_scores(lambda: nn.Linear(3, 2), (inputs, targets), runs=2, epochs=20)
        >>> scores.order()[0], scores.scores.shape
        (tensor(7), torch.Size([40]))
    """
    wanted = _known([score] if isinstance(score, str) else score)
    runs, batch_size = _positive("runs", runs), _positive("batch_size", batch_size)
    if epochs < 0:
        raise ValueError(f"epochs must not be negative, got {epochs}")
    if epochs == 0:
        _check_untrained(wanted)
    reader = ExampleReader(dataset, workers)
    reader.check_same_twice()
    training = reader if training_view is None else ExampleReader(training_view, workers)
    if training.count != reader.count:
        raise ValueError(f"training_view has {training.count} examples, dataset {reader.count}")
    make_optimizer = optimizer or functools.partial(sgd, lr=lr)
    settings = {
        "examples": reader.count,
        "scores": sorted(wanted),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    device = torch.device(device)
    steps = epochs * steps_in(reader.count, batch_size)
    batches = steps + steps_in(reader.count, batch_size)
    per_run: dict[str, list[Tensor]] = {name: [] for name in wanted}
    targets, probabilities = torch.empty(0), torch.zeros(())
    first: nn.Module | None = None
    for run in range(runs):
        file = None if folder is None else Path(folder) / f"run-{run:03d}.safetensors"
        result = None if file is None else _load(file, settings)
        if result is None:
            with seeded(derived_seed(seed, run, 0), device):
                model = model_fn()
            if model is first:
                raise ValueError("model_fn gave the same model twice; it must make a new one each time")
            first = first or model
            result = _run(
                model.to(device),
                training,
                reader,
                wanted,
                steps=steps,
                batch_size=batch_size,
                optimizer=make_optimizer,
                augment=augment,
                seed=derived_seed(seed, run, 1),
                device=device,
                tick=_tell_from(tell, run * batches, runs * batches, f"run {run + 1} of {runs}"),
            )
            if file is not None:
                _save(file, result, settings)
        if run and not torch.equal(result["targets"], targets):
            raise ValueError("the runs are of other labels; empty folder, or give another")
        targets, probabilities = result["targets"], probabilities + result["probabilities"] / runs
        for name in wanted:
            per_run[name].append(result[name])
    found = {
        name: DataScores(name, torch.stack(values), targets, probabilities)
        for name, values in per_run.items()
    }
    return found[score] if isinstance(score, str) else found


def _known(score: Sequence[Score]) -> tuple[Score, ...]:
    wanted = tuple(dict.fromkeys(score))
    for name in wanted:
        if name not in get_args(Score):
            raise ValueError(f"score must be of {', '.join(get_args(Score))}, got {name!r}")
    if not wanted:
        raise ValueError("score names none")
    return wanted


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _check_untrained(wanted: Sequence[Score]) -> None:
    if trackers := [name for name in wanted if name in _TRACKERS]:
        raise ValueError(f"{trackers[0]} is a score of training; epochs must be at least 1, got 0")
    warnings.warn(
        "scores of an untrained network are no evidence of which examples matter: they follow the norm of the input "
        "(arXiv 2303.14753). Give epochs of at least 1",
        stacklevel=3,
    )


def _no_tick() -> None:
    pass


def _tell_from(tell: Tell | None, done: int, total: int, message: str) -> Callable[[], None]:
    if tell is None:
        return _no_tick
    count = done
    tell(count, total, message)

    def tick() -> None:
        nonlocal count
        count += 1
        tell(count, total, message)

    return tick


def _run(
    model: nn.Module,
    training: ExampleReader,
    reader: ExampleReader,
    wanted: Sequence[Score],
    *,
    steps: int,
    batch_size: int,
    optimizer: Callable[[nn.Module], Optimizer],
    augment: Augment | None,
    seed: int,
    device: torch.device,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    trackers = {name: _TRACKERS[name](reader.count, device) for name in wanted if name in _TRACKERS}
    if steps:
        train(
            model,
            training,
            optimizer(model),
            indices=torch.arange(reader.count),
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            device=device,
            augment=augment,
            watch=[tracker.update for tracker in trackers.values()],
            tick=tick,
        )
    result = _evaluate(
        model, reader, [name for name in wanted if name not in trackers], batch_size, device, tick
    )
    for name, tracker in trackers.items():
        scores = tracker.scores().float().cpu()
        result[name] = -scores if name == "aum" else scores
    return result


def _evaluate(
    model: nn.Module,
    reader: ExampleReader,
    wanted: Sequence[Score],
    batch_size: int,
    device: torch.device,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in (*wanted, "probabilities", "targets")}
    with evaluating(model):
        for indices, inputs, targets in reader.in_order(batch_size):
            inputs, targets = to_device(inputs, device), targets.to(device)
            with torch.no_grad():
                logits = model(inputs)
            finite = logits.isfinite().all(-1)
            if not bool(finite.all()):
                raise ValueError(
                    f"the logits of example {int(indices[int(finite.int().argmin())])} are not finite"
                )
            try:
                for name in wanted:
                    parts[name].append(
                        _scored(name, model, inputs, logits, targets.long()).detach().float().cpu()
                    )
            except ValueError as error:
                raise ValueError(f"examples {int(indices[0])} to {int(indices[-1])}: {error}") from error
            parts["probabilities"].append(logits.float().softmax(-1).cpu())
            parts["targets"].append(targets.long().cpu())
            tick()
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _scored(name: Score, model: nn.Module, inputs: Any, logits: Tensor, targets: Tensor) -> Tensor:
    return _LOGITS[name](logits, targets) if name in _LOGITS else grad_norms(model, inputs, targets)


def _load(file: Path, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as kept:
            before = json.loads((kept.metadata() or {}).get("settings", "{}"))
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is no run that data_scores kept ({error}); delete it") from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{file} is a run with {name}={before.get(name)!r}, not {value!r}; empty the folder, or give another"
            )
    return tensors


def _save(file: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    beside = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside, metadata={"settings": json.dumps(settings)})
        os.replace(beside, file)
    except (OSError, SafetensorError) as error:
        raise WeightlabError(f"cannot write {file}: {error}; free the place or choose another") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
