"""Re-measuring papers' claims, one after another, so that nothing already measured is lost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

import weightlab
from weightlab.exceptions import UsageError, WeightlabError
from weightlab.papers import catalogue, record
from weightlab.papers.schema import SCALES, Claim, ClaimContext, ClaimResult, Paper, Scale


@dataclass(frozen=True)
class Progress:
    """A sign of life while claims are measured.

    Attributes:
        slug: Paper in hand.
        claim: Name of its claim in hand.
        done: Claims of this call that are finished.
        total: Claims of this call.
        fraction: How far the claim in hand is, in [0, 1].
        message: One line about what is going on.
    """

    slug: str
    claim: str
    done: int
    total: int
    fraction: float
    message: str


def record_folder(out: Path | str | None = None) -> Path:
    """Return where `reproduce` writes records.

    Args:
        out: Folder asked for. Default: `docs/record` when the current folder is inside the source
            checkout that weightlab is imported from, else `weightlab-out/record` below it.
    """
    if out is not None:
        return Path(out)
    root = record.checkout()
    if root is not None and Path.cwd().resolve().is_relative_to(root):
        return root / "docs" / "record"
    return Path.cwd() / "weightlab-out" / "record"


def reproduce(
    slugs: Sequence[str],
    scale: Scale = "smoke",
    out: Path | str | None = None,
    *,
    work: Path | str | None = None,
    device: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    debug: bool = False,
) -> list[dict[str, Any]]:
    """Run every claim of the papers that works at a scale, and write their records.

    A claim that fails does not stop the others. Interrupted at any moment (also killed), the same call
    continues: finished claims are kept, and trials resume from their store. The same holds after a
    failure: only what failed is run again. What is kept counts only for the same code, versions and
    device.

    Args:
        slugs: Papers, or `["all"]` for all that have claims at this scale.
        scale: `"smoke"`, `"cpu"` or `"gpu"`.
        out: Folder of the records, `<slug>.json` each. Default: see `record_folder`.
        work: Folder for stores and unfinished work. Default: `weightlab-out/reproduce` below the
            current folder.
        device: Torch device string. Default: `"cuda"` at scale gpu, else `"cpu"`.
        engine: Engine of the claims' trials.
        workers: Runs in flight at once, for engines that have workers.
        progress: Called with signs of life.
        debug: Let a failing claim's exception through.

    Returns:
        For each paper: `slug`, `title`, `scale`, `claims` (as in the record), `failed` (name and error
        each), `record` (path of the file; `None` when no claim came to a result).

    Raises:
        UsageError: For an unknown paper or scale, a paper without claims at the scale, or scale gpu
            without a GPU.
        WeightlabError: When a record cannot be read or written; nothing is run before that is known.
    """
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}; use one of {', '.join(SCALES)}")
    chosen = _choose(slugs, scale)
    device = device or _default_device(scale)
    folder = record_folder(out)
    _check_writable(folder)
    for paper, _ in chosen:
        record.load(paper.slug, folder)
    base = Path(work) if work is not None else Path.cwd() / "weightlab-out" / "reproduce"
    total = sum(len(todo) for _, todo in chosen)
    outcomes: list[dict[str, Any]] = []
    done = 0
    for paper, todo in chosen:
        place = base / f"{paper.slug}-{scale}-{_fingerprint(paper.slug, device)}"
        finished = _Finished(place / "finished.json")
        results: list[tuple[Claim, ClaimResult]] = []
        failed: dict[str, str] = {}
        for claim in todo:
            result = finished.get(claim)
            if result is None:
                context = ClaimContext(
                    scale=scale,
                    out=place / claim.name,
                    store=place / "trials.sqlite",
                    device=device,
                    progress=_relay(progress, paper.slug, claim.name, done, total),
                    engine=engine,
                    workers=workers,
                )
                context.progress(0.0, claim.statement)
                try:
                    result = _run(claim, context)
                except Exception as error:
                    if debug:
                        raise
                    failed[claim.name] = _one_line(error)
                else:
                    finished.add(claim, result)
            if result is not None:
                results.append((claim, result))
            done += 1
        if results:
            record.save(paper.slug, scale, results, failed=failed, device=device, where=folder)
        if not failed:
            finished.clear()
        outcomes.append(
            {
                "slug": paper.slug,
                "title": paper.title,
                "scale": scale,
                "claims": [record.claim_entry(claim, result) for claim, result in results],
                "failed": [{"name": name, "error": error} for name, error in failed.items()],
                "record": str(folder / f"{paper.slug}.json") if results else None,
            }
        )
    return outcomes


def command(
    slug: str,
    *,
    scale: Scale = "smoke",
    out: Path | str | None = None,
    device: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    as_json: bool = False,
    debug: bool = False,
) -> None:
    """Reproduce one paper or `all` and print what came out; the command line's verb.

    With `as_json`, prints the outcome of `reproduce` as one object: that of the paper, or for `all`
    `{"scale", "papers": [...]}`.

    Raises:
        UsageError: As `reproduce`.
        WeightlabError: When a claim failed, after everything was printed and kept.
    """
    console = Console()
    with _display(quiet=as_json) as progress:
        outcomes = reproduce(
            [slug],
            scale,
            out,
            device=device,
            engine=engine,
            workers=workers,
            progress=progress,
            debug=debug,
        )
    if as_json:
        value = {"scale": scale, "papers": outcomes} if slug == "all" else outcomes[0]
        print(json.dumps(value, ensure_ascii=False, allow_nan=False))
    else:
        console.print(_table(outcomes))
        for outcome in outcomes:
            if outcome["record"]:
                console.print(f"Record: {outcome['record']}", style="bold", soft_wrap=True, highlight=False)
    failures = [
        f"{outcome['slug']} {failure['name']}: {failure['error']}"
        for outcome in outcomes
        for failure in outcome["failed"]
    ]
    if failures:
        raise WeightlabError(f"{len(failures)} claim(s) failed; {'; '.join(failures)}")


@contextmanager
def _display(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    columns = (
        TextColumn("{task.fields[claim]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1)),
    )
    with Bar(*columns, console=Console(stderr=True), disable=quiet, expand=True, transient=True) as bar:
        row = bar.add_task("", total=1.0, claim="")

        def show(progress: Progress) -> None:
            bar.update(
                row,
                completed=(progress.done + progress.fraction) / progress.total,
                claim=f"{progress.slug} {progress.claim} ({progress.done + 1}/{progress.total})",
                description=escape(progress.message),
            )

        yield show


def _table(outcomes: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "paper", "claim", "verdict", "measured", Column("cost", justify="right"), box=box.SIMPLE_HEAD
    )
    colours = {"held": "green", "not held": "red", "inconclusive": "yellow"}
    for outcome in outcomes:
        for claim in outcome["claims"]:
            verdict = Text(claim["verdict"], style=colours[claim["verdict"]])
            cost = f"{claim['cost']:.0f} s"
            table.add_row(outcome["slug"], claim["name"], verdict, Text(claim["measured"]), cost)
        for failure in outcome["failed"]:
            table.add_row(
                outcome["slug"], failure["name"], Text("failed", style="bold red"), Text(failure["error"])
            )
    return table


class _Finished:
    """Results of a paper's claims that are finished while others are not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._results = {}

    def get(self, claim: Claim) -> ClaimResult | None:
        kept = self._results.get(claim.name)
        if kept is None:
            return None
        interval = kept["interval"]
        return ClaimResult(**{**kept, "interval": tuple(interval) if interval is not None else None})

    def add(self, claim: Claim, result: ClaimResult) -> None:
        self._results[claim.name] = record.plain(result.to_dict())
        record.write_json(self._path, self._results)

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)


def _run(claim: Claim, context: ClaimContext) -> ClaimResult:
    context.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = claim.run(context)
    if not isinstance(result, ClaimResult):
        raise TypeError(f"claim {claim.name!r} returned a {type(result).__name__}, not a ClaimResult")
    record.plain(result.to_dict())
    return result if result.cost else replace(result, cost=time.perf_counter() - start)


def _choose(slugs: Sequence[str], scale: Scale) -> list[tuple[Paper, list[Claim]]]:
    everything = list(slugs) == ["all"]
    entries = catalogue.all_papers() if everything else [catalogue.get(slug) for slug in slugs]
    chosen: dict[str, tuple[Paper, list[Claim]]] = {}
    for entry in entries:
        todo = [claim for claim in entry.claims if scale in claim.scales]
        if todo:
            chosen[entry.paper.slug] = entry.paper, todo
        elif not everything:
            scales = [name for name in SCALES if any(name in claim.scales for claim in entry.claims)]
            have = f"it has claims at {', '.join(scales)}" if scales else "none of its claims is written yet"
            raise UsageError(f"{entry.paper.slug} has no claim at scale {scale}; {have}")
    if not chosen:
        raise UsageError(f"no paper to reproduce at scale {scale}; name one or more, or `all`")
    return list(chosen.values())


def _default_device(scale: Scale) -> str:
    if scale != "gpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UsageError("scale gpu needs a CUDA GPU and PyTorch sees none; use --scale cpu")
    return "cuda"


def _check_writable(folder: Path) -> None:
    probe = folder / ".weightlab-write-test"
    record.write_json(probe, None)
    probe.unlink(missing_ok=True)


def _relay(
    progress: Callable[[Progress], None], slug: str, claim: str, done: int, total: int
) -> Callable[[float, str], None]:
    def relay(fraction: float, message: str) -> None:
        progress(Progress(slug, claim, done, total, min(1.0, max(0.0, fraction)), message))

    return relay


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, WeightlabError) and text else f"{type(error).__name__}: {text}"


def _fingerprint(slug: str, device: str) -> str:
    """Identify what a measurement depends on: the code below the catalogue, this paper's claims, versions."""
    root = Path(weightlab.__file__).parent
    digest = hashlib.sha256()
    for path in _sources(root, slug):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    digest.update(json.dumps([record.versions(), record.machine(device)]).encode())
    return digest.hexdigest()[:12]


def _sources(root: Path, slug: str) -> Iterable[Path]:
    papers = root / "papers"
    own = papers / f"{slug.replace('-', '_')}.py"
    for path in sorted(root.rglob("*.py")):
        if path == own or (not path.is_relative_to(papers) and path.name != "cli.py"):
            yield path
