"""What a merge of files is asked for, and whether that can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from weightlab.exceptions import UsageError
from weightlab.merge.bench import Bench
from weightlab.merge.many_models import Scheme
from weightlab.merge.stored_weights import StoredWeights
from weightlab.merge.weight_arithmetic import mixing_weights

Method = Literal["weights", "average", "slerp", "task-arithmetic"]


@dataclass(frozen=True)
class Settings:
    """What to do.

    Attributes:
        method: How to merge.
        weights: Of each model; for `task-arithmetic` its scale. None: equal, or 1.
        lam: Share of the second of two models, instead of `weights`. None: 0.5.
        base: What the models of `task-arithmetic` were trained from.
        spec: JSON file of a permutation specification. None: inferred from the model.
        scheme: For more than two models, as in `merge_many`.
        seed: For orders of visits and random checks.
        restarts: Orders to try in each matching.
        reset_batch_norm: Whether to take batch norm's statistics anew.
        points: Points on the line between two models at which losses are taken.
        report: HTML file to write. None: none.
        force: Whether to replace what is there.
    """

    method: Method
    weights: tuple[float, ...] | None = None
    lam: float | None = None
    base: str | None = None
    spec: str | None = None
    scheme: Scheme = "mean"
    seed: int = 0
    restarts: int = 5
    reset_batch_norm: bool = False
    points: int = 11
    report: str | None = None
    force: bool = False


def check_settings(paths: Sequence[str], settings: Settings, bench: Bench | None) -> list[float]:
    """Return a weight, or scale, of each model. Raises UsageError if the settings do not fit together."""
    method, count = settings.method, len(paths)
    if method not in get_args(Method):
        raise UsageError(f"unknown method {method!r}; use one of {', '.join(get_args(Method))}")
    adds = method == "task-arithmetic"
    if count < (1 if adds else 2):
        raise UsageError(f"{method} takes {'one model' if adds else 'two models'} or more, got {count}")
    if method == "slerp" and count != 2:
        raise UsageError(f"slerp takes two models, got {count}; use average for more")
    if adds != (settings.base is not None):
        raise UsageError(
            "task-arithmetic needs --base, the model that the others were trained from"
            if adds
            else f"--base is for task-arithmetic, not for {method}"
        )
    if settings.spec is not None and method != "weights":
        raise UsageError(f"--spec is for weights, not for {method}, which permutes nothing")
    if settings.lam is not None and (adds or count != 2 or settings.weights is not None):
        raise UsageError(
            "--lam is the second model's share of two; use --weights for more models, or --scale for task-arithmetic"
        )
    if settings.lam is not None and not 0 <= settings.lam <= 1:
        raise UsageError(f"--lam must lie in [0, 1], got {settings.lam:g}")
    if bench is None and (method == "weights" or settings.reset_batch_norm):
        raise UsageError(
            f"{'weights' if method == 'weights' else '--reset-batch-norm'} runs the network: give --task, --model "
            "file.py:object, or a folder with a config.json that transformers knows"
        )
    if settings.reset_batch_norm and not (bench and bench.train):
        raise UsageError("--reset-batch-norm needs data: give --task, or --data file.py:object")
    if adds:
        scales = (1.0,) * count if settings.weights is None else settings.weights
        if len(scales) == 1:
            scales *= count
        if len(scales) != count or not all(map(math.isfinite, scales)):
            raise UsageError(
                f"--scale takes one finite number, or one for each of {count} models, got {[*scales]}"
            )
        return [*scales]
    given = settings.weights if settings.lam is None else (1 - settings.lam, settings.lam)
    try:
        return mixing_weights(count, given)
    except ValueError as error:
        raise UsageError(f"--weights: {error}") from error


def free_place(out: str, inputs: Sequence[StoredWeights], settings: Settings) -> Path:
    """Return where to write. Raises UsageError if that is taken, or of another kind than the first model.

    Args:
        out: As given.
        inputs: What will be read, the base last.
        settings: Whether to replace, and where the report goes.
    """
    target = Path(out).expanduser().resolve()
    places = [(stored.path, stored.root.resolve()) for stored in inputs]
    for i, (path, place) in enumerate(places):
        if place in [other for _, other in places[:i]]:
            raise UsageError(f"{path} is given twice; merging takes different models")
        if target == place or target.is_relative_to(place) or place.is_relative_to(target):
            raise UsageError(
                f"--out {out} is, holds or lies in {path}, which is to be merged; give another place"
            )
    is_folder = inputs[-1].is_folder if settings.base is not None else inputs[0].is_folder
    if not is_folder and target.suffix != ".safetensors":
        raise UsageError(
            f"--out {out} is to be a file like the first model; let its name end in .safetensors"
        )
    if is_folder and target.suffix == ".safetensors":
        raise UsageError(f"--out {out} is to be a folder like the first model; give it another name")
    if target.exists() and target.is_dir() != is_folder:
        raise UsageError(
            f"--out {out} is a {'folder' if target.is_dir() else 'file'}, and would become the other"
        )
    if target.exists() and not settings.force:
        raise UsageError(f"{out} exists; give another --out, or --force to replace it")
    if target.is_dir() and any(target.iterdir()) and not any(target.glob("*.safetensors")):
        raise UsageError(f"{out} exists and holds no model; --force does not replace it")
    if settings.report is not None:
        page = Path(settings.report).expanduser().resolve()
        if page == target or any(page == place for _, place in places):
            raise UsageError(f"--report {settings.report} is a model's own place; give another")
        if page.is_dir():
            raise UsageError(f"--report {settings.report} is a folder; give a file, e.g. merge.html")
        if page.exists() and not settings.force:
            raise UsageError(f"{settings.report} exists; give another --report, or --force to replace it")
    return target
