"""What is scored, and by which model: the examples of a task, or of files."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from weightlab.exceptions import TaskError, UsageError
from weightlab.inspect.example_training import Augment
from weightlab.tasks import registry
from weightlab.tasks.classification import Classification
from weightlab.tasks.data.hub import parquet_files
from weightlab.tasks.digest import digest
from weightlab.tasks.files import is_file_ref, load_object, source_fingerprint, summary
from weightlab.tasks.models.mlp import MLP
from weightlab.tasks.models.resnet import ResNet
from weightlab.trial.scoring.reading import Labelled, read_arrays, read_folders, read_parquet

MODELS = ("mlp", "resnet8", "resnet20")
HIDDEN = 128
CONV_FROM = 16
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


class Prepared(nn.Module):
    """A model of stored inputs: makes floats of them first."""

    def __init__(self, prepare: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.prepare = prepare
        self.model = model

    def forward(self, stored: Tensor) -> Tensor:
        """Return the model's logits."""
        return self.model(self.prepare(stored))


@dataclass(frozen=True, eq=False)
class Source:
    """Examples to score, and the model to score them by.

    Attributes:
        name: What they are called.
        inputs: As they are stored, `(N, ...)`; images are `(N, H, W)` or `(N, C, H, W)`.
        labels: int64 `(N,)`.
        test: Inputs and labels to test on, if there are any.
        build: Makes a model that takes a batch of `inputs` as stored, from PyTorch's global random numbers.
        model: What the model is called.
        augment: Changes training inputs at random.
        classes: Names of the classes; empty for numbers.
        identity: Digest of examples and model.
        batch_size: The task's; `None` where there is none.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    test: tuple[Tensor, Tensor] | None
    build: Callable[[], nn.Module]
    model: str
    identity: str
    augment: Augment | None = None
    classes: tuple[str, ...] = ()
    batch_size: int | None = None

    def first(self, count: int | None) -> Source:
        """Return the first `count` examples, and all of the test set."""
        if count is None or count >= len(self.labels):
            return self
        if count < 1:
            raise UsageError(f"--limit must be at least 1; got {count}")
        return replace(
            self,
            inputs=self.inputs[:count],
            labels=self.labels[:count],
            identity=digest(self.identity, count),
        )

    def called(self, label: int) -> str:
        """Return the name of a class."""
        return self.classes[label] if label < len(self.classes) else str(label)


def task_source(ref: str, *, tested: bool = True) -> Source:
    """Return a task's training split.

    Args:
        ref: A name, or `path.py:object`.
        tested: Whether to read its test split as well.

    Raises:
        UsageError: If there is no such task, or it is not a `Classification`.
        TaskError: If its data are missing.
    """
    task = registry.get(ref)
    if not isinstance(task, Classification):
        raise UsageError(
            f"task {ref} has no labelled examples by index; data-scores takes tasks that subclass "
            "weightlab.tasks.classification.Classification"
        )

    def build() -> nn.Module:
        seed = int(torch.randint(2**62, ()))
        return Prepared(task.prepare, task.build(torch.Generator().manual_seed(seed)))

    inputs, labels = task.images("train")
    return Source(
        name=task.name,
        inputs=inputs,
        labels=labels,
        test=task.images("test") if tested else None,
        build=build,
        model="the task's",
        identity=digest(ref, source_fingerprint(ref) if is_file_ref(ref) else "", task.fingerprint()),
        augment=None if type(task).augment is Classification.augment else task.augment,
        batch_size=task.batch_size,
    )


def data_source(
    data: str,
    *,
    model: str | None = None,
    image: str = "image",
    label: str = "label",
    split: str = "train",
    test_split: str | None = "test",
    size: int | None = None,
    limit: int | None = None,
) -> Source:
    """Read labelled examples from files.

    Inputs are standardised for the model: by channel if they are images, else by feature.

    Args:
        data: `.npz` or `.safetensors` with `x`, `y` and, to test on, `x_test`, `y_test`; a Parquet file; a folder of
            Parquet files, or of images in a folder a class, either of them under the splits' names or not; or a data
            set's id `owner/name[:config]`.
        model: A name in `MODELS`, or `path.py:object` that makes a module of float inputs. Default: `"resnet8"` for
            images whose sides have 16 pixels or more, else `"mlp"`.
        image: Column of images in Parquet.
        label: Column of labels there.
        split: Split to score.
        test_split: Split to test on, if it is there; `None` for none.
        size: Side to which images are scaled.
        limit: Read no more than the first so many examples from Parquet.

    Raises:
        UsageError: If the data are not of these kinds, or cannot be read, or there is no such model.
        TaskError: If a data set is neither under `WEIGHTLAB_DATA` nor on the Hub.
        MissingDependencyError: If reading needs a package that is missing.
    """
    if size is not None and size < 1:
        raise UsageError(f"--size must be at least 1; got {size}")
    path = Path(data).expanduser()
    train, test = _read(data, path, image, label, split, test_split, size, limit)
    if test is not None and (
        test.inputs.shape[1:] != train.inputs.shape[1:] or test.classes != train.classes
    ):
        raise UsageError(
            f"{data}: the test set's examples, {tuple(test.inputs.shape[1:])} of classes {_listed(test)}, are unlike "
            f"those to score, {tuple(train.inputs.shape[1:])} of classes {_listed(train)}"
        )
    labels = train.labels if test is None else torch.cat([train.labels, test.labels])
    count = max(len(train.classes), int(labels.max()) + 1)
    if count < 2:
        raise UsageError(f"{data} has a single class; scores need at least two")
    chosen = model or (
        "resnet8" if train.inputs.ndim == 4 and min(train.inputs.shape[2:]) >= CONV_FROM else "mlp"
    )
    return Source(
        name=path.name if path.exists() else data,
        inputs=train.inputs,
        labels=train.labels,
        test=None if test is None else (test.inputs, test.labels),
        build=_builder(chosen, train.inputs, count),
        model=chosen,
        identity=digest(
            train.inputs, train.labels, chosen, source_fingerprint(chosen) if is_file_ref(chosen) else ""
        ),
        classes=train.classes,
    )


def _listed(data: Labelled) -> str:
    return ", ".join(data.classes[:5]) or "0, 1, ..."


def _read(
    data: str,
    path: Path,
    image: str,
    label: str,
    split: str,
    test_split: str | None,
    size: int | None,
    limit: int | None,
) -> tuple[Labelled, Labelled | None]:
    if path.is_file():
        if path.suffix in (".npz", ".safetensors"):
            train, test = read_arrays(path)
            return train, test if test_split else None
        if path.suffix == ".parquet":
            return read_parquet([path], image, label, size, limit), None
        raise UsageError(f"{data} is neither .npz, .safetensors nor .parquet")
    if path.is_dir():
        files = _parquet_in(path, split)
        if files:
            test_files = _parquet_in(path, test_split) if test_split else []
            train = read_parquet(files, image, label, size, limit)
            return train, read_parquet(test_files, image, label, size) if test_files else None
        if any(path.rglob("*.parquet")):
            raise UsageError(
                f"{data} has no Parquet files of a split {split!r} ({split}-*.parquet); --split names another"
            )
        apart = (path / split).is_dir()
        tested = apart and test_split is not None and (path / test_split).is_dir()
        train = read_folders(path / split if apart else path, size)
        return train, read_folders(path / str(test_split), size) if tested else None
    if not _HUB_ID.fullmatch(data):
        raise UsageError(f"no file or folder {data}, nor is it a data set's id owner/name[:config]")
    repository, _, config = data.partition(":")
    train = read_parquet(parquet_files(repository, config, split), image, label, size, limit)
    if test_split is None:
        return train, None
    try:
        test_files = parquet_files(repository, config, test_split)
    except TaskError:
        return train, None
    return train, read_parquet(test_files, image, label, size)


def _parquet_in(folder: Path, split: str) -> list[Path]:
    """Files of a split: `split-*.parquet` or `split.parquet`, anywhere below, or those in a folder of that name."""
    found = {*folder.rglob(f"{split}-*.parquet"), *folder.rglob(f"{split}.parquet")}
    return sorted(found or (folder / split).glob("*.parquet"))


def _builder(model: str, inputs: Tensor, classes: int) -> Callable[[], nn.Module]:
    prepare = _standardise(inputs)
    if is_file_ref(model):
        made = load_object(model)
        if not callable(made):
            raise UsageError(f"--model {model} must be callable without arguments and return a module")

        def build() -> nn.Module:
            try:
                module = made()
            except Exception as error:
                raise UsageError(f"--model {model} could not be called: {summary(error)}") from error
            if not isinstance(module, nn.Module):
                raise UsageError(f"--model {model} gave no module but {type(module).__name__}")
            return Prepared(prepare, module)

        _try(build, model, inputs[:2], classes)
        return build
    if model not in MODELS:
        raise UsageError(f"unknown model {model!r}; known: {', '.join(MODELS)}; your own: path.py:object")
    if model == "mlp":
        features = inputs[0].numel()
        return lambda: Prepared(prepare, MLP([features, HIDDEN, classes]))
    if inputs.ndim != 4:
        raise UsageError(
            f"--model {model} is for images; inputs are {tuple(inputs.shape[1:])}, for which take mlp"
        )
    depth = int(model.removeprefix("resnet"))
    return lambda: Prepared(lambda stored: prepare(stored).expand(-1, 3, -1, -1), ResNet(depth, classes))


def _try(build: Callable[[], nn.Module], model: str, stored: Tensor, classes: int) -> None:
    """Check that a user's model takes the inputs and tells enough classes apart."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        built = build().eval()
        try:
            logits = built(stored)
        except Exception as error:
            raise UsageError(
                f"--model {model} does not take a batch of inputs {tuple(stored.shape[1:])}: {summary(error)}"
            ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.shape[:-1] != stored.shape[:1] or logits.shape[-1] < classes:
        raise UsageError(
            f"--model {model} must give logits ({len(stored)}, {classes}) for {len(stored)} inputs of {classes} "
            f"classes; it gives {shape}"
        )


def _standardise(inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a map to floats of mean 0 and variance 1 by channel or, if they are no images, by feature."""
    dims = [0, *range(2, inputs.ndim)] if inputs.ndim == 4 else [0]
    mean, square = torch.zeros(()), torch.zeros(())
    for part in inputs.split(4096):
        values = part.double()
        mean = mean + values.sum(dims, keepdim=True)
        square = square + values.square().sum(dims, keepdim=True)
    count = inputs.numel() / mean.numel()
    mean, square = mean / count, square / count
    spread = (square - mean.square()).clamp(min=0).sqrt()
    spread = torch.where(spread > 1e-6 * (1 + mean.abs()), spread, 1.0)
    centre, scale = mean.float(), spread.float()

    def prepare(stored: Tensor) -> Tensor:
        return (stored.float() - centre.to(stored.device)) / scale.to(stored.device)

    return prepare
