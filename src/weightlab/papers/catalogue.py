"""The catalogue: every paper with its claims, how far weightlab has got, and what was measured.

A file of this package that defines `PAPER` and `CLAIMS` is an entry; adding one adds a paper. Status
and verdict are derived from the code and the record, never written down. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from weightlab.exceptions import UsageError
from weightlab.papers import _ranking, _static, record
from weightlab.papers.schema import SCALES, Claim, Paper, Scale, Verdict

Status = Literal["planned", "implemented", "measured"]
STATUSES: tuple[Status, ...] = get_args(Status)

_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_WEIGHTS = {"title": 5.0, "names": 4.0, "authors": 3.0, "summary": 1.0}


@dataclass(frozen=True)
class Entry:
    """A paper as the catalogue knows it.

    Attributes:
        paper: The paper's facts.
        claims: Its claims and the protocols that test them.
        status: `"planned"` until all of the paper's parts exist, then `"implemented"`; `"measured"`
            once there is a record.
        verdict: Verdicts of the largest scale on record, e.g. `"2 held, 1 not held"`; `None` without.
        record: The record as stored, or `None`.
    """

    paper: Paper
    claims: tuple[Claim, ...]
    status: Status
    verdict: str | None = None
    record: dict[str, Any] | None = None

    @property
    def scale(self) -> Scale | None:
        """Largest scale on record, the one that `verdict` is about."""
        return _largest_scale(self.record)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Results of the claims at `scale`, as recorded."""
        scale = self.scale
        return [] if self.record is None or scale is None else list(self.record["scales"][scale]["claims"])

    @cached_property
    def available(self) -> tuple[str, ...]:
        """Those of the paper's parts that exist."""
        return tuple(part for part in self.paper.parts if _static.exists(part))

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms that put the paper's method on trial."""
        return _static.arms().get(self.paper.slug, ())

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON types: the facts, status, verdict, claims and results."""
        fields = ("name", "statement", "threshold", "expected", "scales")
        return {
            **asdict(self.paper),
            "status": self.status,
            "verdict": self.verdict,
            "scale": self.scale,
            "claims": [{field: getattr(claim, field) for field in fields} for claim in self.claims],
            "measured": self.measured,
            "arms": self.arms,
        }


def all_papers() -> list[Entry]:
    """Return every entry, in the order of the papers' numbers.

    Example:
        >>> [entry.paper.slug for entry in all_papers()][:2]
        ['rich-lazy', 'winner']
    """
    return sorted(map(_entry, _entry_modules()), key=lambda entry: entry.paper.number)


def get(slug: str) -> Entry:
    """Return one entry by its slug or arXiv id. Case, `_` and `-` do not matter.

    Raises:
        UsageError: When there is none; the message suggests the nearest.

    Example:
        >>> get("AuON").paper.arxiv, get("2509.24320").paper.slug
        ('2509.24320', 'auon')
    """
    wanted = slug.strip().lower().replace("_", "-").removeprefix("arxiv:")
    papers = {name.replace("_", "-"): name for name in _entry_modules()}
    if wanted in papers:
        return _entry(papers[wanted])
    for entry in all_papers():
        if entry.paper.arxiv == wanted:
            return entry
    near = difflib.get_close_matches(wanted, papers, n=1, cutoff=0.5)
    if not near and _ranking.terms(slug):
        near = [entry.paper.slug for entry, _ in search(slug)[:1]]
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown paper {slug!r}; {hint}`weightlab papers` lists them all")


def search(text: str) -> list[tuple[Entry, float]]:
    """Rank the papers that match a text, best first.

    Words in the title count most, then those in slug, keywords and names of parts, then authors, then
    the summary. Beginnings of words and near misses match as well, at less weight.

    Raises:
        UsageError: When the text holds no letter or digit.

    Example:
        >>> [entry.paper.slug for entry, score in search("singular value fine-tuning")][:1]
        ['svfit']
    """
    if not _ranking.terms(text):
        raise UsageError(f"search text {text!r} holds no word; give one, e.g. 'orthogonal'")
    entries = all_papers()
    ranked = _ranking.rank(text, [_document(entry.paper) for entry in entries], _WEIGHTS)
    return [(entries[index], score) for index, score in ranked]


def to_json(entries: Iterable[Entry] | None = None) -> list[dict[str, Any]]:
    """Return entries (default: all) as plain JSON types, see `Entry.to_json`."""
    return [entry.to_json() for entry in (all_papers() if entries is None else entries)]


@cache
def _entry_modules() -> tuple[str, ...]:
    folder = Path(__file__).parent
    return tuple(
        module.name
        for module in pkgutil.iter_modules([str(folder)])
        if not module.ispkg and _static.is_entry((folder / f"{module.name}.py").read_text(encoding="utf-8"))
    )


def _entry(module_name: str) -> Entry:
    module = importlib.import_module(f"weightlab.papers.{module_name}")
    paper: Paper = module.PAPER
    measured = record.load(paper.slug)
    if _largest_scale(measured) is not None:
        status: Status = "measured"
    else:
        status = "implemented" if all(map(_static.exists, paper.parts)) else "planned"
    return Entry(paper, tuple(module.CLAIMS), status, _verdict(measured), measured)


def _largest_scale(measured: dict[str, Any] | None) -> Scale | None:
    present: list[Scale] = [] if measured is None else [s for s in SCALES if s in measured["scales"]]
    return present[-1] if present else None


def _verdict(measured: dict[str, Any] | None) -> str | None:
    scale = _largest_scale(measured)
    if measured is None or scale is None:
        return None
    counts = Counter(claim["verdict"] for claim in measured["scales"][scale]["claims"])
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in _VERDICTS if counts[verdict]) or None


def _document(paper: Paper) -> dict[str, str]:
    names = (paper.slug, paper.arxiv, paper.date, paper.venue, *paper.keywords, *paper.parts, *paper.code)
    return {
        "title": paper.title,
        "names": " ".join(names),
        "authors": " ".join(paper.authors),
        "summary": paper.summary,
    }
