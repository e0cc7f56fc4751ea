import datetime
import importlib
import io
import json
import re
import subprocess
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from weightlab.exceptions import UsageError
from weightlab.papers import _ranking, _static, all_papers, display, get, record, search, to_json

SLUGS = [
    "rich-lazy", "winner", "orthogonal-conv", "kat", "svd-free-dct", "bone", "online-odl", "root",
    "auon", "ptd", "rich-feature-construction", "lambda-orthogonality", "subgm", "eva",
    "deep-linear-dynamics", "virgo", "jlcm", "learngene-sws", "s4d", "streaming-eigenvector",
    "orthogonal-adaptation", "generalization-dynamics", "svfit", "fast-certified-training", "sorsa",
    "weight-matching", "data-diet", "setol", "weight-compander", "ghost-batch-norm", "continual-dst",
    "universality-lens", "mixture-growth", "ibp-tightness", "ofq", "aro", "infinite-compute",
    "unsupervised-pretraining", "tangle-nas", "lemon",
]  # fmt: skip
ROOMS = {
    "linalg", "init", "nn", "optim", "adapters", "compress", "certify", "grow", "merge", "inspect", "stream",
    "theory", "train",
}  # fmt: skip


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "folder", lambda: tmp_path)

    def write(slug, **scales):
        claims = {
            scale: {"claims": [{"name": f"claim-{i}", "verdict": v} for i, v in enumerate(verdicts)]}
            for scale, verdicts in scales.items()
        }
        (tmp_path / f"{slug}.json").write_text(json.dumps({"slug": slug, "scales": claims}))

    return write


@pytest.fixture
def room(monkeypatch):
    def make(name, *public):
        module = types.ModuleType(f"weightlab.{name}")
        module.__all__ = list(public)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return make


def printed(function, *arguments, width=80, **options):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    function(*arguments, console=console, **options)
    return console.file.getvalue()


def test_the_forty_are_there_in_order():
    papers = [entry.paper for entry in all_papers()]
    assert [paper.number for paper in papers] == list(range(1, 41))
    assert [paper.slug for paper in papers] == SLUGS


@pytest.mark.parametrize("entry", all_papers(), ids=lambda entry: entry.paper.slug)
def test_facts_are_well_formed(entry):
    paper = entry.paper
    year, month, *day = map(int, paper.date.split("-"))
    assert re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", paper.date)
    assert datetime.date(year, month, *day or [1]) <= datetime.date.today()
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    # The identifier starts with the year and month of submission, which may be the last days of a month
    # whose identifier, or date of first version as given, falls into the next.
    assert abs((year * 12 + month) - ((2000 + int(paper.arxiv[:2])) * 12 + int(paper.arxiv[2:4]))) <= 1
    assert 0 <= len(paper.authors) <= paper.author_count
    assert paper.author_count >= 1
    assert paper.room in ROOMS
    assert paper.parts
    assert {part.partition(".")[0] for part in paper.parts} <= ROOMS
    assert all(re.fullmatch(r"[a-z]+(\.[a-z_]+)*\.[A-Za-z_]\w*", part) for part in paper.parts)
    assert all(re.fullmatch(r"https://\S+|[\w.-]+/[\w.-]+", code) for code in paper.code)
    assert 3 <= len(re.findall(r"[.?!](?:\s|$)", paper.summary)) <= 12
    assert "  " not in paper.summary
    assert paper.keywords
    names = [claim.name for claim in entry.claims]
    assert len(names) == len(set(names))


def test_no_fact_is_shared_by_two_papers():
    papers = [entry.paper for entry in all_papers()]
    for fact in ("slug", "title", "arxiv", "summary"):
        values = [getattr(paper, fact) for paper in papers]
        assert len(set(values)) == len(values), fact


def test_entry_file_is_named_after_its_slug():
    for slug in SLUGS:
        module = importlib.import_module(f"weightlab.papers.{slug.replace('-', '_')}")
        assert module.PAPER.slug == slug


@pytest.mark.parametrize("code", ["all_papers()", "search('orthogonal')", "get('auon').to_json()", "show"])
def test_the_catalogue_never_imports_torch(code):
    call = (
        "from weightlab.papers import display; [display.show(e) for e in all_papers()]"
        if code == "show"
        else f"to_json(); {code}"
    )
    script = f"from weightlab.papers import *; {call}\nimport sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize("slug", ["auon", "AuON", " auon ", "2509.24320", "arXiv:2509.24320"])
def test_get_by_slug_or_arxiv_id(slug):
    assert get(slug).paper.slug == "auon"


def test_get_takes_underscores():
    assert get("svd_free_dct").paper.slug == "svd-free-dct"


@pytest.mark.parametrize(
    ("asked", "nearest"), [("auno", "auon"), ("weight-maching", "weight-matching"), ("vREx", "rich-feature")]
)
def test_unknown_paper_suggests_the_nearest(asked, nearest):
    with pytest.raises(UsageError, match=f"unknown paper '{asked}'; did you mean '{nearest}"):
        get(asked)


@pytest.mark.parametrize("asked", ["", "???", "0" * 50])
def test_unknown_paper_without_a_neighbour(asked):
    with pytest.raises(UsageError, match="weightlab papers"):
        get(asked)


def test_status_follows_the_public_names_of_the_rooms(records, room):
    room("optim")
    assert get("auon").status == "planned"
    room("optim", "AuON")
    assert get("auon").status == "planned"
    assert get("auon").available == ("optim.AuON",)
    room("optim", "AuON", "HybridAuON", "Else")
    entry = get("auon")
    assert (entry.status, entry.verdict, entry.scale) == ("implemented", None, None)


def test_a_part_inside_a_module_is_looked_up_in_its_source(tmp_path, monkeypatch):
    package = tmp_path / "demo_room"
    package.mkdir()
    (package / "__init__.py").write_text("__all__ = ['functional', 'Plain']")
    (package / "functional.py").write_text(
        "import torch_is_not_imported_here\nfrom x import borrowed as ours\n"
        "def rational(): inner = 1\nclass Law: pass\nTABLE = {}\nlimit: int = 3\n"
    )
    import weightlab

    monkeypatch.setattr(weightlab, "__path__", [*weightlab.__path__, str(tmp_path)])
    part = "demo_room.functional."
    there = ["rational", "Law", "TABLE", "limit", "ours", "inner", "borrowed", "absent"]
    assert [_static.exists(part + name) for name in there] == [True] * 5 + [False] * 3
    assert _static.exists("demo_room.Plain")
    assert _static.exists("demo_room.functional")
    assert not _static.exists("demo_room.hidden")
    assert not _static.exists("no_such_room.Part")
    assert "weightlab.demo_room.functional" not in sys.modules
    for name in ("weightlab.demo_room",):
        monkeypatch.delitem(sys.modules, name)


def test_a_broken_room_is_not_taken_for_a_planned_one(tmp_path, monkeypatch):
    (tmp_path / "broken_room.py").write_text("import there_is_no_such_module")
    import weightlab

    monkeypatch.setattr(weightlab, "__path__", [*weightlab.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        _static.exists("broken_room.Part")


def test_verdict_counts_the_largest_scale_on_record(records):
    records("auon", smoke=["inconclusive"] * 3, cpu=["not held", "held", "held"])
    entry = get("auon")
    assert (entry.status, entry.scale, entry.verdict) == ("measured", "cpu", "2 held, 1 not held")
    records("auon", smoke=["held"], gpu=["inconclusive"], cpu=["not held"])
    assert (get("auon").scale, get("auon").verdict) == ("gpu", "1 inconclusive")
    assert [claim["verdict"] for claim in get("auon").measured] == ["inconclusive"]


def test_a_record_without_any_scale_measures_nothing(records, room):
    room("optim")
    records("auon")
    assert (get("auon").status, get("auon").verdict) == ("planned", None)


def test_json_has_what_scripts_rely_on(records):
    records("auon", cpu=["held"])
    objects = json.loads(json.dumps(to_json()))
    assert [item["slug"] for item in objects] == SLUGS
    assert all({"slug", "title", "date", "status", "verdict", "parts"} <= item.keys() for item in objects)
    auon = objects[8]
    assert (auon["status"], auon["verdict"], auon["authors"]) == ("measured", "1 held", ["Dipan Maity"])


@pytest.mark.parametrize("entry", all_papers(), ids=lambda entry: entry.paper.slug)
def test_a_paper_is_found_first_by_title_slug_part_and_arxiv_id(entry):
    paper = entry.paper
    for query in (paper.title, paper.slug, paper.arxiv, f"{paper.slug} {paper.room}"):
        assert search(query)[0][0].paper.slug == paper.slug, query
    for part in paper.parts:
        found = [hit.paper for hit, _ in search(part)[:3]]
        assert any(part in hit.parts for hit in found), part


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("bottou", "rich-feature-construction"),
        ("Leon Bottou", "rich-feature-construction"),
        ("orthgonal convolutoin", "orthogonal-conv"),
        ("kolmogorv", "kat"),
        ("PADE", "kat"),
        ("lambda", "lambda-orthogonality"),
        ("state space", "s4d"),
        ("graph neural nets", "virgo"),
        ("GroupRational", "kat"),
        ("galore", "svd-free-dct"),
    ],
)
def test_what_people_type(query, slug):
    assert search(query)[0][0].paper.slug == slug


def test_both_spellings_find_the_same():
    def slugs(text):
        return [entry.paper.slug for entry, _ in search(text)]

    assert slugs("quantisation") == slugs("quantization") != []
    assert "ofq" in slugs("quantisation")


def test_search_without_a_word_and_without_a_match():
    with pytest.raises(UsageError, match="holds no word"):
        search(" -- ")
    assert search("xyzzyqqq") == []


def test_fields_rank_by_weight():
    fields = ("title", "names", "authors", "summary")
    documents = [{field: "muon"} for field in reversed(fields)]
    weights = dict(zip(fields, (5.0, 4.0, 3.0, 1.0), strict=True))
    assert [index for index, _ in _ranking.rank("muon", documents, weights)] == [3, 2, 1, 0]


def test_exact_beats_prefix_and_near_misses_are_a_last_resort():
    documents = [{"t": "optima"}, {"t": "optimizer"}, {"t": "optim"}]
    assert [i for i, _ in _ranking.rank("optim", documents, {"t": 1.0})] == [2, 0, 1]
    documents = [{"t": "muon"}, {"t": "moon"}, {"t": "apple"}]
    assert [i for i, _ in _ranking.rank("muon", documents, {"t": 1.0})] == [0]
    assert sorted(i for i, _ in _ranking.rank("mmon", documents, {"t": 1.0})) == [0, 1]


def test_covering_the_query_beats_repeating_one_word():
    documents = [{"t": "low low low low"}, {"t": "low rank"}, {"t": "other"}, {"t": "more"}]
    assert [i for i, _ in _ranking.rank("low rank", documents, {"t": 1.0})] == [1, 0]


WORDS = st.text(alphabet="abcde éÉλ-Σ9\n", max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=6), WORDS)
def test_ranking_is_sorted_case_blind_and_blind_to_document_order(texts, query):
    documents = [{"t": text} for text in texts]
    ranked = _ranking.rank(query, documents, {"t": 1.0})
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True)
    assert all(score > 0 for score in scores)
    reverse = dict(_ranking.rank(query.upper(), documents[::-1], {"t": 1.0}))
    assert {len(texts) - 1 - index: score for index, score in reverse.items()} == pytest.approx(dict(ranked))


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("by", ["date", "room", "status"])
def test_reading_list_names_every_paper_once_within_the_width(width, by):
    text = printed(display.reading_list, all_papers(), by=by, width=width)
    assert all(len(re.findall(rf"(?<!\S){slug}(?!\S)", text)) == 1 for slug in SLUGS)
    assert max(map(len, text.splitlines())) <= width


def test_reading_list_is_newest_first():
    text = printed(display.reading_list, all_papers())
    years = [int(line) for line in text.splitlines() if re.fullmatch(r"\d{4}", line.strip())]
    assert years == sorted({int(entry.paper.date[:4]) for entry in all_papers()}, reverse=True)
    assert text.index(" aro ") < text.index(" root ") < text.index(" deep-linear-dynamics ")


def test_reading_list_shows_verdicts_and_totals(records):
    records("auon", cpu=["held", "not held"])
    text = printed(display.reading_list, all_papers(), by="status")
    assert text.startswith("40 papers · 1 measured")
    assert re.search(r"auon .* 1 held, 1 not held", text)
    assert text.index("\nmeasured 1") < text.index("\nplanned")
    assert "0 papers" in printed(display.reading_list, [])


def test_a_verdict_from_a_smoke_run_says_so(records):
    records("auon", smoke=["held"])
    assert re.search(r"auon .* 1 held \(smoke\)", printed(display.reading_list, all_papers()))
    records("auon", smoke=["held"], cpu=["held"])
    assert "smoke" not in printed(display.reading_list, all_papers())


def test_search_results_are_limited_and_say_so():
    found = search("learning")
    assert len(found) > 4
    text = printed(display.search_results, found, limit=3)
    assert f"… and {len(found) - 3} more" in text
    assert "No paper matches" in printed(display.search_results, [])


def test_show_tells_everything_about_a_paper(tmp_path, monkeypatch, room):
    room("optim", "AuON", "HybridAuON")
    monkeypatch.setattr(record, "folder", lambda: tmp_path)
    monkeypatch.setattr(_static, "arms", lambda: {"auon": ("auon", "hybrid-auon")})
    run = {
        "claims": [{"name": "linear-time", "verdict": "held", "measured": "slope 1.98"}],
        "versions": {"torch": "2.11.0"},
        "machine": "2-core CPU",
        "date": "2026-03-01",
        "cost": 12.3,
        "failed": [{"name": "brake", "error": "OSError: no disk"}],
    }
    (tmp_path / "auon.json").write_text(json.dumps({"slug": "auon", "scales": {"cpu": run}}))
    text = printed(display.show, get("auon"), width=120)
    for expected in (
        "AuON: A Linear-time Alternative to Semi-Orthogonal Momentum Updates",
        "Dipan Maity",
        "https://arxiv.org/abs/2509.24320",
        "https://github.com/ryyzn9/AuON",
        "from weightlab.optim import AuON, HybridAuON",
        "weightlab trial --task docs-gpt --arms adamw,auon,hybrid-auon",
        "measured: 1 held",
        "slope 1.98",
        "2-core CPU",
        "torch 2.11.0",
        "12 s",
        "brake failed: OSError: no disk",
    ):
        assert expected in text
    flat = " ".join(text.split())
    assert get("auon").paper.summary in flat


def test_show_of_a_planned_paper_promises_nothing(monkeypatch, room):
    room("stream")
    text = printed(display.show, get("online-odl"))
    assert "Nothing to try yet" in text
    assert "weightlab.stream.OnlineOrthogonalDictionary  planned" in text
    assert "import" not in text.split("Try it")[1]


def test_square_brackets_in_facts_are_not_markup(records):
    records("auon", cpu=["held"])
    found = get("auon")
    found.record["scales"]["cpu"]["claims"][0].update(measured="loss [0.1, 0.2] [bold]", name="[red]a")
    text = printed(display.show, found, width=120)
    assert "loss [0.1, 0.2] [bold]" in text
    assert "[red]a" in text


def test_arms_are_found_without_importing_them():
    for slug, names in _static.arms().items():
        assert slug in SLUGS
        assert names


def test_every_registered_arm_of_a_paper_is_found_without_importing_it():
    from weightlab.papers import _static
    from weightlab.trial import registry

    registered = {(a.paper, a.name) for a in map(registry.arm, registry.arm_names()) if a.paper}
    assert {(slug, name) for slug, names in _static.arms().items() for name in names} == registered
