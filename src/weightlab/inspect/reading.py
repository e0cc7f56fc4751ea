"""What `weightlab inspect` does: reading a checkpoint, or two, so that it can be stopped and go on."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import weightlab
from weightlab._lazy import require
from weightlab._pages.files import write_text
from weightlab._progress import WorkBar
from weightlab.exceptions import UsageError
from weightlab.inspect.binned_spectrum import BinnedSpectrum, bin_spectrum
from weightlab.inspect.checkpoint import Checkpoint
from weightlab.inspect.comparison import Comparison, make_comparison
from weightlab.inspect.layer_changes import Change, ChangeRow, change_rows
from weightlab.inspect.layer_pairs import pair_layers
from weightlab.inspect.layers import Layer, walk_layers
from weightlab.inspect.report import LayerRow, Report, layer_rows, make_report
from weightlab.inspect.spectrum import ConvView
from weightlab.inspect.spectrum_work import layer_work
from weightlab.inspect.unfinished import KeptRows

Spectra = dict[str, BinnedSpectrum]
Row = TypeVar("Row", LayerRow, ChangeRow)


@dataclass(frozen=True)
class Settings:
    """What to read, how, and which files to write. Names and defaults are those of the command's options."""

    checkpoint: str
    compare: str | None = None
    layers: tuple[str, ...] = ()
    split_qkv: bool = False
    conv: ConvView = "slices"
    randomize: bool = False
    seed: int = 0
    dtype: str = "float64"
    device: str | None = None
    min_eigenvalues: int = 8
    max_eigenvalues: int = 15_000
    html: str | None = None
    csv: str | None = None


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        result: The report, or the comparison.
        spectra: Layer -> its binned spectra: `"weight"`, or `"before"`, `"after"` and `"delta"`.
    """

    result: Report | Comparison
    spectra: dict[str, Spectra]


def read(
    settings: Settings, *, resume: bool = False, force: bool = False, bar: WorkBar, command: str
) -> Reading:
    """Read a checkpoint, or compare two, and write the files that are asked for.

    Rows are kept in a file until everything is written, so that after any stop the same command goes on.

    Args:
        settings: What to do.
        resume: Whether to go on with an unfinished reading.
        force: Whether to replace files that exist, and to forget an unfinished reading.
        bar: Shows how far it is.
        command: The command as typed, for the page.

    Raises:
        UsageError: For settings that are impossible, files that cannot be read, or outputs that exist.
        WeightlabError: If a file cannot be written.
        KeyboardInterrupt: On Ctrl-C, with word of how to go on.
    """
    _check(settings)
    outputs = _outputs(settings, force)
    checkpoints = [Checkpoint(path) for path in (settings.checkpoint, settings.compare) if path is not None]
    files = [file for checkpoint in checkpoints for file in checkpoint.files]
    read_from = {file.resolve() for file in files}
    for option, path in outputs.items():
        if path.resolve() in read_from:
            raise UsageError(f"{option} {path} is the checkpoint itself; give another file")
    determining = dataclasses.asdict(settings) | {"html": None, "csv": None, "version": weightlab.__version__}
    kept = KeptRows(files, determining, resume=resume, force=force)
    try:
        with bar:
            reading = (_compare if settings.compare is not None else _inspect)(
                settings, checkpoints, kept, bar
            )
        _write(settings, reading, command)
    except KeyboardInterrupt:
        kept.close()
        raise KeyboardInterrupt(_stopped(kept)) from None
    except BaseException:
        kept.close()
        raise
    if kept.problem is not None:
        bar.say(f"Warning: {kept.problem}; what was read could not have been resumed")
    kept.discard()
    return reading


def _stopped(kept: KeptRows) -> str:
    if kept.problem is not None or not kept.rows:
        return "Stopped. No layer was kept; the same command starts over."
    layers = "1 layer, which is" if len(kept.rows) == 1 else f"{len(kept.rows)} layers, which are"
    return f"Stopped after {layers} kept; the same command with --resume goes on."


def _check(settings: Settings) -> None:
    if settings.randomize and settings.compare is not None:
        raise UsageError("--randomize is for one checkpoint; leave it out with --compare")
    if not 2 <= settings.min_eigenvalues <= settings.max_eigenvalues:
        raise UsageError(
            f"--min-eigenvalues must be at least 2 and at most --max-eigenvalues, got {settings.min_eigenvalues} and "
            f"{settings.max_eigenvalues}"
        )
    if settings.html is not None:
        require("jinja2", "trial")
    if settings.device is None:
        return
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {settings.device} is not to be had: {str(error).splitlines()[0]}"
        ) from None


def _outputs(settings: Settings, force: bool) -> dict[str, Path]:
    """See before the work that its results can be written."""
    options = {"--html": settings.html, "--csv": settings.csv}
    outputs = {option: Path(text).expanduser() for option, text in options.items() if text is not None}
    for option, path in outputs.items():
        if path.exists() and not path.is_file():
            raise UsageError(f"{option} {path} is a folder or a device; give a file")
        if path.exists() and not force:
            raise UsageError(f"{path} exists; give another {option}, or --force to replace it")
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise UsageError(
                f"{option} {path} cannot be written: {above} is no folder that may be written to"
            )
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise UsageError(f"--html and --csv are the same file, {settings.html}; give two")
    return outputs


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "conv": settings.conv,
        "dtype": getattr(torch, settings.dtype),
        "device": settings.device,
        "min_eigenvalues": settings.min_eigenvalues,
        "max_eigenvalues": settings.max_eigenvalues,
    }


def _inspect(settings: Settings, checkpoints: list[Checkpoint], kept: KeptRows, bar: WorkBar) -> Reading:
    (checkpoint,) = checkpoints
    layers = list(walk_layers(checkpoint, layers=settings.layers or None, split_qkv=settings.split_qkv))
    todo = [layer for layer in layers if layer.name not in kept.rows]
    results = layer_rows(todo, randomize=settings.randomize, seed=settings.seed, **_options(settings))

    def pack(result: tuple[LayerRow, Tensor | None]) -> dict[str, Any]:
        row, eigenvalues = result
        # NaN, of layers without a fit, compares as no wish.
        marked = min(math.inf, row.erg_eigenvalue, row.xmin)
        spectra = {} if eigenvalues is None else {"weight": bin_spectrum(eigenvalues, marked)}
        return {"row": row, "spectra": spectra}

    _run(todo, results, pack, len(layers), settings, kept, bar)
    rows, spectra = [], {}
    for layer in layers:
        value = kept.rows[layer.name]
        rows.append(_unpacked(LayerRow, value["row"]))
        spectra[layer.name] = _spectra(value["spectra"])
    return Reading(make_report(checkpoint.source, rows), spectra)


def _compare(settings: Settings, checkpoints: list[Checkpoint], kept: KeptRows, bar: WorkBar) -> Reading:
    before, after = checkpoints
    pairing = pair_layers(before, after, layers=settings.layers or None, split_qkv=settings.split_qkv)
    todo = [pair for pair in pairing.pairs if pair.before.name not in kept.rows]

    def pack(change: Change) -> dict[str, Any]:
        spectra = {which: bin_spectrum(values) for which, values in change.eigenvalues.items()}
        return {**change._asdict(), "spectra": spectra, "eigenvalues": None}

    _run(
        [pair.before for pair in todo],
        change_rows(todo, **_options(settings)),
        pack,
        len(pairing.pairs),
        settings,
        kept,
        bar,
    )
    changes, spectra = [], {}
    for pair in pairing.pairs:
        value = kept.rows[pair.before.name]
        old, new, delta = (
            value[which] and _unpacked(LayerRow, value[which]) for which in ("before", "after", "delta")
        )
        changes.append(Change(_unpacked(ChangeRow, value["row"]), old, new, delta, {}))
        spectra[pair.before.name] = _spectra(value["spectra"])
    return Reading(make_comparison(before.source, after.source, changes, pairing), spectra)


def _run(
    todo: list[Layer],
    results: Iterator[Any],
    pack: Callable[[Any], dict[str, Any]],
    total: int,
    settings: Settings,
    kept: KeptRows,
    bar: WorkBar,
) -> None:
    if len(todo) < total:
        bar.say(f"resuming: {total - len(todo)} of {total} layers are read")
    work = [layer_work(layer, settings.conv) for layer in todo]
    done = 0.0
    for index, (layer, share) in enumerate(zip(todo, work, strict=True)):
        bar.tell(f"layer {index + 1} of {len(todo)}: {layer.name}", done, sum(work))
        kept.add(layer.name, _packed(pack(next(results))))
        done += share


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _unpacked(kind: type[Row], values: dict[str, Any]) -> Row:
    """A row from what JSON made of it: lists are tuples."""
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return kind(**fields)


def _spectra(values: dict[str, Any]) -> Spectra:
    return {
        which: BinnedSpectrum(**{**spectrum, "counts": tuple(spectrum["counts"])})
        for which, spectrum in values.items()
    }


def _write(settings: Settings, reading: Reading, command: str) -> None:
    if settings.csv is not None:
        write_text(Path(settings.csv).expanduser(), reading.result.to_csv())
    if settings.html is not None:
        from weightlab.inspect.report_page import report_html

        text = report_html(
            reading.result, reading.spectra, settings=dataclasses.asdict(settings), command=command
        )
        write_text(Path(settings.html).expanduser(), text)
