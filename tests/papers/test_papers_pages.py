from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from weightlab.papers import catalogue, record
from weightlab.papers.schema import Claim, ClaimResult

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "generate_papers.py"
    spec = importlib.util.spec_from_file_location("generate_papers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_index_lists_every_paper_once(pages: ModuleType):
    entries = catalogue.all_papers()
    text = pages.index_page(entries, lambda room: None)
    for entry in entries:
        assert text.count(f"({entry.paper.slug}.md)") == 1
    assert {room for room, _ in pages.by_room(entries)} <= set(pages.ROOMS)


def test_every_paper_has_a_page_with_its_facts(pages: ModuleType):
    for entry in catalogue.all_papers():
        text = pages.paper_page(entry, lambda room: f"rooms/{room}.md")
        assert text.startswith(f"# {entry.paper.title}\n")
        assert f"https://arxiv.org/abs/{entry.paper.arxiv}" in text
        assert entry.paper.summary in text
        for claim in entry.claims:
            assert claim.threshold in text


def test_page_shows_what_was_measured_at_each_scale(pages: ModuleType, tmp_path: Path):
    claim = Claim(
        name="fast",
        statement="It is fast.",
        threshold="ratio < 1",
        expected="2 times",
        run=lambda context: small,
    )
    small = ClaimResult(verdict="inconclusive", measured="ratio 0.99", cost=1.0)
    figure = {"title": "Time & size", "series": [{"name": "a", "x": [1, 2], "y": [1, 2]}]}
    large = ClaimResult(
        verdict="held",
        measured="ratio 0.5",
        figure=figure,
        table=[{"n|m": 8, "ms": 0.123456}],
        seeds=(0, 1),
        cost=70.2,
    )
    record.save("auon", "smoke", [(claim, small)], where=tmp_path)
    record.save("auon", "cpu", [(claim, large)], where=tmp_path)
    entry = replace(catalogue.get("auon"), claims=(claim,), record=record.load("auon", tmp_path))
    text = pages.paper_page(entry, lambda room: None)
    assert text.index("**Held** (cpu") < text.index("**Inconclusive** (smoke")
    assert "70 s, seeds 0, 1). ratio 0.5" in text
    assert "| n\\|m | ms |\n| --- | --- |\n| 8 | 0.1235 |" in text
    figure_block = text[text.index("<figure>") : text.index("</figure>")]
    assert "Time &amp; size" in figure_block
    assert "\n\n" not in figure_block
    assert "weightlab reproduce auon --scale smoke" in text


def test_navigation_lists_the_pages_below_the_index(pages: ModuleType):
    entries = catalogue.all_papers()
    expanded = pages._expand(["index.md", {"Papers": "papers/index.md"}], pages.by_room(entries))
    assert expanded[0] == "index.md"
    index, *rooms = expanded[1]["Papers"]
    assert index == "papers/index.md"
    paths = [path for room in rooms for group in room.values() for page in group for path in page.values()]
    assert sorted(paths) == sorted(f"papers/{entry.paper.slug}.md" for entry in entries)
    beside = pages._expand([{"Read": ["start.md", "papers/index.md"]}], [("nn", [])])
    assert beside == [{"Read": ["start.md", "papers/index.md", {"nn": []}]}]
