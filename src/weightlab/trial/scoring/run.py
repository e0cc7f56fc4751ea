"""Scoring a training set, writing what was found, and retraining without some of it: the body of `weightlab data-scores`."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

from weightlab._pages.files import write_text
from weightlab._progress import WorkBar
from weightlab.exceptions import UsageError, WeightlabError
from weightlab.inspect.scored_data import DataScores, rank_correlation
from weightlab.inspect.scoring import Score, data_scores
from weightlab.tasks.digest import digest
from weightlab.trial.report.export import dumps
from weightlab.trial.scoring.page import LIKELY, TITLES, WEAK, otherwise, page, verdict
from weightlab.trial.scoring.retraining import Recipe, Retrained, retrain
from weightlab.trial.scoring.sources import Source, data_source, task_source

REPORT, PAGE, TABLE = "data-scores.json", "data-scores.html", "scores.csv"
RUNS, SETTINGS = "runs", "settings.json"
LISTED = 20
BATCH = 128
UNTRAINED = (
    "These are scores of untrained networks. They follow the norm of the input and are no evidence of which examples "
    "matter (arXiv 2303.14753); score after an epoch or more."
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is scored, and how.

    Attributes:
        out: Folder to write.
        task: Task whose training split is scored; or else
        data: examples in files, see `sources.data_source`.
        model: Model for `data`.
        image: Column of images.
        label: Column of labels.
        split: Split to score.
        test_split: Split to test retrained models on.
        size: Side to which images are scaled.
        limit: Score the first so many examples only.
        scores: Which scores; the first decides ranks, page and pruning.
        runs: Models to train.
        epochs: Passes over the data before scoring.
        batch_size: Default: the task's, or 128.
        lr: Learning rate.
        seed: Decides everything random.
        device: Torch device. Default: CUDA if it is there, else the CPU.
        show: Examples on a sheet of the page.
        retrain: Shares of the easiest examples to leave out in retraining.
        offset: Share of the hardest to leave out as well, in a further choice.
        seeds: Retrainings of each choice.
        retrain_epochs: Length of each, in passes over all examples.

    Raises:
        UsageError: If a value is out of range.
    """

    out: str
    task: str | None = None
    data: str | None = None
    model: str | None = None
    image: str = "image"
    label: str = "label"
    split: str = "train"
    test_split: str = "test"
    size: int | None = None
    limit: int | None = None
    scores: tuple[Score, ...] = ("el2n",)
    runs: int = 10
    epochs: int = 10
    batch_size: int | None = None
    lr: float = 0.05
    seed: int = 0
    device: str | None = None
    show: int = 48
    retrain: tuple[float, ...] = ()
    offset: float = 0.0
    seeds: int = 5
    retrain_epochs: int = 20

    def __post_init__(self) -> None:
        if (self.task is None) == (self.data is None):
            raise UsageError("give either --task or --data")
        if self.task is not None and self.model is not None:
            raise UsageError("--model goes with --data; a task has its model")
        if not self.scores:
            raise UsageError(f"--score names none; there are {', '.join(get_args(Score))}")
        for name in self.scores:
            if name not in get_args(Score):
                raise UsageError(f"unknown score {name!r}; there are {', '.join(get_args(Score))}")
        for name, least in (
            ("limit", 1),
            ("runs", 1),
            ("epochs", 0),
            ("batch_size", 1),
            ("seed", 0),
            ("show", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
        if not 0 < self.lr < float("inf"):
            raise UsageError(f"--lr must be above 0 and finite; got {self.lr}")
        if self.offset and not self.retrain:
            raise UsageError("--offset goes with --retrain")
        self.recipe(1)

    def recipe(self, batch_size: int) -> Recipe:
        """Return how to retrain."""
        return Recipe(
            pruned=self.retrain,
            offset=self.offset,
            seeds=self.seeds,
            epochs=self.retrain_epochs,
            batch_size=batch_size,
            lr=self.lr,
        )


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        report: What is in `data-scores.json`, in JSON types.
        found: Scores by name.
        retrained: What retraining gave; empty without.
    """

    report: dict[str, Any]
    found: dict[str, DataScores]
    retrained: list[Retrained]


def score_data(
    settings: Settings,
    *,
    resume: bool = False,
    force: bool = False,
    display: WorkBar | None = None,
    command: str = "",
) -> Outcome:
    """Score the examples of a task or of files, and write table, page and report.

    Every run that ends is kept in `<out>/runs`, every retraining in `<out>`: what was broken off goes on, and more runs
    or retrainings can be added.

    Args:
        settings: What to do.
        resume: Take up what is kept.
        force: Forget it.
        display: Where to show progress.
        command: The command line, for the page.

    Raises:
        UsageError: If the request cannot be met.
        WeightlabError: If training diverges, or a file cannot be written.
        KeyboardInterrupt: If stopped; the message says how to go on.
    """
    display = display or WorkBar()
    source = _source(settings)
    batch_size = settings.batch_size or source.batch_size or BATCH
    device = _device(settings.device)
    out = Path(settings.out).expanduser()
    kept = _claimed(out, _identity(settings, source, batch_size), resume=resume, force=force)
    try:
        with display:
            found = _scored(settings, source, batch_size, device, out / RUNS, display)
            retrained = _retrained(
                settings, source, next(iter(found.values())), batch_size, device, out, display
            )
    except KeyboardInterrupt:
        runs = len(list((out / RUNS).glob("run-*.safetensors")))
        if runs == 0 and not kept:
            shutil.rmtree(out, ignore_errors=True)
            raise KeyboardInterrupt("Stopped before the first run was done; nothing is kept.") from None
        raise KeyboardInterrupt(
            f"Stopped. {min(runs, settings.runs)} of {settings.runs} runs are kept in {settings.out}; "
            "the same command with --resume goes on."
        ) from None
    notes = _notes(settings, found[settings.scores[0]])
    report = _report(settings, source, found, retrained, batch_size, device, command) | {"notes": notes}
    html = page(
        source,
        found,
        facts=_facts(settings, source, batch_size),
        show=settings.show,
        retrained=retrained,
        recipe=settings.recipe(batch_size) if retrained else None,
        notes=notes,
        command=command,
        versions=_versions(device),
    )
    for name, result in found.items():
        table = TABLE if name == settings.scores[0] else f"scores-{name}.csv"
        write_text(out / table, result.to_csv())
    write_text(out / PAGE, html)
    write_text(out / REPORT, dumps(report) + "\n")
    return Outcome(report, found, retrained)


def _source(settings: Settings) -> Source:
    if settings.task is not None:
        source = task_source(settings.task, tested=bool(settings.retrain))
    else:
        assert settings.data is not None
        source = data_source(
            settings.data,
            model=settings.model,
            image=settings.image,
            label=settings.label,
            split=settings.split,
            test_split=settings.test_split if settings.retrain else None,
            size=settings.size,
            limit=settings.limit,
        )
    if settings.retrain and source.test is None:
        raise UsageError(
            f"{source.name} has no test set, which --retrain needs: x_test and y_test, or a split --test-split"
        )
    return source.first(settings.limit)


def _device(name: str | None) -> torch.device:
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _identity(settings: Settings, source: Source, batch_size: int) -> dict[str, Any]:
    """What the runs that are kept depend on."""
    return {
        "data": source.identity,
        "score": sorted(settings.scores),
        "epochs": settings.epochs,
        "batch_size": batch_size,
        "lr": settings.lr,
        "seed": settings.seed,
    }


def _claimed(out: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> bool:
    """Make the folder ready; return whether it has something to go on with."""
    file = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not file.exists():
        raise UsageError(f"{out} exists and is not a folder of data-scores; give another --out")
    before, held = None, any((out / RUNS).glob("run-*")) or (out / REPORT).exists()
    if held and force:
        shutil.rmtree(out / RUNS, ignore_errors=True)
        for path in (*out.glob("retrained-*.jsonl"), *out.glob("scores*.csv"), out / PAGE, out / REPORT):
            path.unlink(missing_ok=True)
    elif held:
        if not resume:
            raise UsageError(
                f"{out} holds scores, or runs of some; --resume goes on with them, --force starts over"
            )
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if not isinstance(before, dict) or before.get(name) != value:
                what = (
                    "other data or another model" if name == "data" else f"another --{name.replace('_', '-')}"
                )
                raise UsageError(
                    f"what {out} holds was made with {what}; give another --out, or --force to start over"
                )
    write_text(file, json.dumps(identity, indent=2) + "\n")
    return before is not None


def _scored(
    settings: Settings, source: Source, batch_size: int, device: torch.device, runs: Path, display: WorkBar
) -> dict[str, DataScores]:
    display.phase(
        f"scoring {len(source.labels):,} examples "
        f"by {_counted(settings.runs, 'run')} of {_counted(settings.epochs, 'epoch')} on {device}"
    )
    with warnings.catch_warnings():
        # Page and summary say it.
        warnings.filterwarnings("ignore", message="scores of an untrained network")
        try:
            return data_scores(
                source.build,
                (source.inputs, source.labels),
                settings.scores,
                runs=settings.runs,
                epochs=settings.epochs,
                batch_size=batch_size,
                lr=settings.lr,
                augment=source.augment,
                seed=settings.seed,
                device=device,
                folder=runs,
                tell=lambda done, total, what: display.tell(what, done, total),
            )
        except (ValueError, TypeError) as error:
            raise WeightlabError(str(error)) from error


def _retrained(
    settings: Settings,
    source: Source,
    result: DataScores,
    batch_size: int,
    device: torch.device,
    out: Path,
    display: WorkBar,
) -> list[Retrained]:
    if not settings.retrain:
        return []
    recipe = settings.recipe(batch_size)
    choices = recipe.choices()
    display.phase(
        f"retraining on {len(choices)} choices of examples, {recipe.seeds} seeds each, "
        f"{recipe.steps(len(source.labels)):,} steps a training"
    )
    key = digest(result.scores, recipe.epochs, batch_size, recipe.lr, settings.seed)[:12]
    return retrain(
        source,
        result.scores,
        recipe,
        seed=settings.seed,
        device=device,
        kept=out / f"retrained-{key}.jsonl",
        tell=lambda done, total, what: display.tell(what, done, total),
    )


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _notes(settings: Settings, result: DataScores) -> list[str]:
    if settings.epochs == 0:
        return [UNTRAINED]
    share = otherwise(result)
    if share <= WEAK:
        return []
    return [
        f"The models predict another class for {100 * share:.0f} % of the examples: they have learned too little to judge "
        "labels by. Give them more epochs, another learning rate, or another model."
    ]


def _facts(settings: Settings, source: Source, batch_size: int) -> list[str]:
    classes = len(source.classes) or int(source.labels.max()) + 1
    return [
        f"{len(source.labels):,} examples of {classes} classes",
        f"scored by {', '.join(TITLES[name] for name in settings.scores)}",
        f"{_counted(settings.runs, 'run')} of {_counted(settings.epochs, 'epoch')}",
        f"model: {source.model}",
        f"batch {batch_size}, learning rate {settings.lr:g}, seed {settings.seed}",
    ]


def _versions(device: torch.device) -> str:
    return f"weightlab {version('weightlab')}, torch {torch.__version__}, Python {platform.python_version()}, {device.type}"


def _report(
    settings: Settings,
    source: Source,
    found: Mapping[str, DataScores],
    retrained: list[Retrained],
    batch_size: int,
    device: torch.device,
    command: str,
) -> dict[str, Any]:
    result = found[settings.scores[0]]
    suspicion, predicted = result.suspicion, result.predicted
    suspects = suspicion.argsort(descending=True, stable=True)
    suspects = suspects[suspicion[suspects] > 0][:LISTED]
    names = list(found)
    files = {"table": TABLE, "page": PAGE, **{name: f"scores-{name}.csv" for name in names[1:]}}
    return {
        "data": source.name,
        "examples": len(source.labels),
        "score": names[0],
        "agreement": None if settings.runs == 1 else result.agreement(),
        "predicted_otherwise": int((predicted != result.targets).sum()),
        "suspicious": int((suspicion >= LIKELY).sum()),
        "likely_mislabelled": [
            {
                "index": index,
                "label": source.called(int(source.labels[index])),
                "predicted": source.called(int(predicted[index])),
                "suspicion": float(suspicion[index]),
            }
            for index in suspects.tolist()
        ],
        "hardest": result.order()[:LISTED].tolist(),
        "correlations": {
            f"{first} {second}": rank_correlation(found[first].scores, found[second].scores)
            for place, first in enumerate(names)
            for second in names[place + 1 :]
        },
        "retraining": [asdict(row) | {"name": row.choice.name} for row in retrained],
        "settings": asdict(settings) | {"batch_size": batch_size, "device": str(device)},
        "files": {name: str(Path(settings.out) / file) for name, file in files.items()},
        "command": command,
        "versions": _versions(device),
    }


def summary(outcome: Outcome) -> str:
    """Say in a few lines what was found.

    Args:
        outcome: What `score_data` returns.
    """
    report = outcome.report
    title, agreement = TITLES[report["score"]], report["agreement"]
    lines = [
        f"{report['examples']:,} examples of {report['data']} scored by {title}"
        + ("" if agreement is None else f"; a run's ranking correlates with the others' by {agreement:.3f}"),
        f"another class is predicted for {report['predicted_otherwise']:,}; "
        f"{report['suspicious']:,} look mislabelled (suspicion of {LIKELY:g} or more)",
    ]
    lines += [f"! {note}" for note in report["notes"]]
    for row in outcome.retrained:
        line = f"trained on {row.choice.name}: test error {100 * row.error:.2f} %"
        if row.to_all is not None:
            mean, (low, high) = row.to_all
            line += f", minus all {100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] points"
        lines.append(line)
    if outcome.retrained:
        lines.append(verdict(outcome.retrained))
    return "\n".join([*lines, *(f"{name}: {path}" for name, path in report["files"].items())])
