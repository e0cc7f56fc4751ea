"""MkDocs hook: one page a paper and their index, from the catalogue and the record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from weightlab.papers.catalogue import Entry, all_papers
from weightlab.papers.figure import svg
from weightlab.papers.schema import SCALES, Claim

INDEX = "papers/index.md"
ROOMS = (
    "linalg",
    "init",
    "nn",
    "optim",
    "adapters",
    "compress",
    "certify",
    "grow",
    "merge",
    "inspect",
    "stream",
    "theory",
    "train",
)
Link = Callable[[str], str | None]
"""Room ("optim") or part ("optim.AuON") -> page about it, relative to the site's root."""
COST = {"smoke": "seconds", "cpu": "up to 6 minutes on 2 cores", "gpu": "up to 10 minutes on one large GPU"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages below the navigation's entry for the papers' index."""
    if config.nav:
        config.nav = _expand(config.nav, by_room(all_papers()))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    entries = all_papers()
    link = _links(files)
    pages = {INDEX: index_page(entries, link)}
    pages |= {f"papers/{entry.paper.slug}.md": paper_page(entry, link) for entry in entries}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def by_room(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """Group papers by their main room, in the order of rooms, then of numbers."""
    ordered = sorted(entries, key=lambda entry: (ROOMS.index(entry.paper.room), entry.paper.number))
    return [(room, list(group)) for room, group in groupby(ordered, key=lambda entry: entry.paper.room)]


def index_page(entries: Sequence[Entry], link: Link) -> str:
    """Write the page that lists all papers."""
    count = {
        status: sum(entry.status == status for entry in entries) for status in ("measured", "implemented")
    }
    lines = [
        "# Papers",
        "",
        f"The {len(entries)} papers that weightlab's parts come from. {count['measured']} are measured, "
        f"{count['implemented']} more are implemented, the rest is planned. A verdict counts the paper's claims "
        "by what we measured, under thresholds that were fixed before; `weightlab reproduce` measures them again.",
        "",
    ]
    for room, group in by_room(entries):
        heading = f"[`weightlab.{room}`](../{page})" if (page := link(room)) else f"`weightlab.{room}`"
        rows = [
            {
                "Paper": f"[{_cell(entry.paper.title)}]({entry.paper.slug}.md)",
                "Short name": f"`{entry.paper.slug}`",
                "Year": entry.paper.date[:4],
                "Status": entry.status,
                "Verdict": _overall(entry),
            }
            for entry in group
        ]
        lines += [f"## {heading}", "", *_table(rows), ""]
    return "\n".join(lines)


def paper_page(entry: Entry, link: Link) -> str:
    """Write one paper's page."""
    paper = entry.paper
    authors = ", ".join(paper.authors) or f"{paper.author_count} authors"
    facts = [
        ("arXiv", f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"),
        ("First version", paper.date),
        ("Authors", authors),
        ("Published", paper.venue),
        ("Official code", ", ".join(map(_code_link, paper.code)) or "none known"),
        ("Status", f"{entry.status}; {verdict}" if (verdict := _overall(entry)) else entry.status),
    ]
    lines = [f"# {paper.title}", "", *(f"- **{name}:** {value}" for name, value in facts if value)]
    lines += ["", paper.summary, "", "## Parts", ""]
    lines += [f"- {_part(name, entry, link)}" for name in paper.parts]
    if entry.arms:
        lines += ["", f"Arms for trials: {', '.join(f'`{arm}`' for arm in entry.arms)}."]
    lines += ["", "## Claims", ""]
    if not entry.claims:
        lines += ["No claim is written down yet.", ""]
    for claim in entry.claims:
        lines += _claim(claim, entry)
    if entry.claims:
        scales = [scale for scale in SCALES if any(scale in claim.scales for claim in entry.claims)]
        commands = [f"weightlab reproduce {paper.slug} --scale {scale}   # {COST[scale]}" for scale in scales]
        lines += ["## Measure it again", "", "```sh", *commands, "```", ""]
    return "\n".join(lines)


def _expand(nav: list[Any], rooms: Sequence[tuple[str, Sequence[Entry]]]) -> list[Any]:
    pages: list[Any] = [INDEX]
    for room, group in rooms:
        pages.append({room: [{entry.paper.slug: f"papers/{entry.paper.slug}.md"} for entry in group]})

    def expand(value: Any) -> Any:
        if value == INDEX:
            return pages
        if isinstance(value, Mapping):
            return {title: expand(part) for title, part in value.items()}
        if isinstance(value, list):
            return [part for item in value for part in (pages if item == INDEX else [expand(item)])]
        return value

    return [{"Papers": pages} if item == INDEX else expand(item) for item in nav]


def _overall(entry: Entry) -> str:
    return f"{entry.verdict} ({entry.scale})" if entry.verdict else ""


def _part(name: str, entry: Entry, link: Link) -> str:
    label = f"`weightlab.{name}`"
    if name not in entry.available:
        return f"{label} (planned)"
    page = link(name)
    return f"[{label}](../{page})" if page else label


def _links(files: Files) -> Link:
    def link(name: str) -> str | None:
        room, _, part = name.partition(".")
        about, reference = (
            files.get_file_from_path(f"rooms/{room}.md"),
            files.get_file_from_path(f"api/{room}.md"),
        )
        if part and reference and f"::: weightlab.{name}\n" in f"{reference.content_string}\n":
            return f"{reference.src_uri}#weightlab.{name}"
        page = about or reference
        return page.src_uri if page else None

    return link


def _code_link(code: str) -> str:
    url = code if "://" in code else f"https://github.com/{code}"
    return f"[{code}]({url})"


def _claim(claim: Claim, entry: Entry) -> list[str]:
    lines = [f"### {claim.name}", "", claim.statement, ""]
    if claim.expected:
        lines += [f"**The paper reports:** {claim.expected}", ""]
    lines += [f"**Threshold, fixed before measuring:** {claim.threshold}", ""]
    results = _results(claim, entry)
    if not results:
        return [*lines, "Not measured yet.", ""]
    for scale, measured, result in results:
        how = f"{scale}, {measured['machine']}, {measured['date']}, {result['cost']:.0f} s"
        if result["seeds"]:
            how += f", seeds {', '.join(map(str, result['seeds']))}"
        lines += [f"**{result['verdict'].capitalize()}** ({how}). {result['measured']}", ""]
    _, _, largest = results[0]
    if largest["figure"]:
        # A block-level element, so that Markdown leaves what is inside alone.
        lines += ["<figure>", svg(largest["figure"]), "</figure>", ""]
    if largest["table"]:
        lines += [*_table(largest["table"]), ""]
    return lines


def _results(claim: Claim, entry: Entry) -> list[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    scales = entry.record["scales"] if entry.record else {}
    return [
        (scale, scales[scale], result)
        for scale in reversed(SCALES)
        if scale in scales
        for result in scales[scale]["claims"]
        if result["name"] == claim.name
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(column) for column in columns] for row in rows)]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
