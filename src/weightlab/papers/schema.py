"""The form of a catalogue entry: a paper's facts, its claims, and what re-measuring them gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Scale = Literal["smoke", "cpu", "gpu"]
Verdict = Literal["held", "not held", "inconclusive"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper's facts. Contains nothing measured and nothing about how far weightlab has got.

    Attributes:
        number: Position in the list of forty, 1-based.
        slug: Short name used everywhere: command line, record, pages.
        title: Title of the version the entry describes.
        authors: Names where they are known; may be empty.
        author_count: Number of authors.
        date: `YYYY-MM` or `YYYY-MM-DD` of the first version.
        arxiv: arXiv identifier without version, e.g. `"2509.24320"`.
        venue: Where it was published, e.g. `"ICML 2023"`; empty for a preprint.
        code: URLs or `owner/name` of official code; empty when there is none.
        summary: One paragraph in our words.
        room: Main room, e.g. `"optim"`.
        parts: Public names that implement it, e.g. `"optim.AuON"`.
        keywords: Search terms that title and summary do not hold.
    """

    number: int
    slug: str
    title: str
    authors: tuple[str, ...] = ()
    author_count: int
    date: str
    arxiv: str
    venue: str = ""
    code: tuple[str, ...] = ()
    summary: str
    room: str
    parts: tuple[str, ...]
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClaimContext:
    """What a claim gets to run with.

    Attributes:
        scale: `"smoke"` (seconds), `"cpu"` (≤ 6 minutes on 2 cores), `"gpu"` (≤ 10 minutes on one card).
        out: Folder for whatever the claim wants to leave behind.
        store: Trial store that the claim's trials resume from.
        device: Torch device string.
        progress: Called with a fraction in [0, 1] and one line about what is going on.
        engine: Engine for trials: `"local"`, `"process"` or `"ray"`.
        workers: Runs in flight at once, for engines that have workers.
    """

    scale: Scale
    out: Path
    store: Path
    device: str = "cpu"
    progress: Callable[[float, str], None] = lambda fraction, message: None
    engine: str = "local"
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """What re-measuring a claim gave.

    Attributes:
        verdict: By the threshold stated in the claim.
        measured: One sentence with the numbers.
        value: The deciding number, if there is one.
        interval: Its interval.
        figure: Series for the page's plot: `{"title", "x_label", "y_label", "log_x", "log_y",
            "series": [{"name", "x", "y", "low"?, "high"?}]}`; `None` for no plot.
        table: Rows of a table for the page, each a mapping of the same columns.
        cost: Seconds it took.
        seeds: Seeds used.
    """

    verdict: Verdict
    measured: str
    value: float | None = None
    interval: tuple[float, float] | None = None
    figure: Mapping[str, Any] | None = None
    table: Sequence[Mapping[str, Any]] = ()
    cost: float = 0.0
    seeds: Sequence[int] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of a paper, and the protocol that puts it to the test.

    Attributes:
        name: Short name, unique within the paper, e.g. `"linear-time"`.
        statement: What is claimed, as a testable sentence.
        threshold: When the verdict is "held", when "not held": fixed before any run.
        expected: What the paper reports, in short; empty if it gives no number.
        scales: Scales at which `run` works.
        run: Carries out the protocol. Imports what is heavy inside.
    """

    name: str
    statement: str
    threshold: str
    expected: str = ""
    scales: tuple[Scale, ...] = ("smoke", "cpu")
    run: Callable[[ClaimContext], ClaimResult] = field(repr=False)
