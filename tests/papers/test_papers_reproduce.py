from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.exceptions import UsageError, WeightlabError
from weightlab.papers import catalogue, record, reproduce
from weightlab.papers.catalogue import Entry
from weightlab.papers.schema import SCALES, Claim, ClaimContext, ClaimResult, Paper

FACTS = Paper(
    number=1,
    slug="toy",
    title="Toy",
    author_count=1,
    date="2024-01",
    arxiv="2401.00001",
    summary="A toy.",
    room="optim",
    parts=(),
)


def make_claim(name: str, run: Callable[[ClaimContext], ClaimResult], **changes: Any) -> Claim:
    return Claim(name=name, statement=f"{name} is so", threshold="> 0", run=run, **changes)


def held(value: float = 1.0) -> ClaimResult:
    return ClaimResult(verdict="held", measured=f"value {value}", value=value, interval=(0.5, 1.5), cost=0.25)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Put a paper `toy` with given claims in the catalogue, and run in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def install(*claims: Claim, slug: str = "toy") -> None:
        entry = Entry(replace(FACTS, slug=slug), claims, "implemented")
        monkeypatch.setattr(catalogue, "all_papers", lambda: [entry])
        monkeypatch.setattr(catalogue, "get", lambda wanted: {slug: entry}[wanted])

    return install


def strict(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class TestRecord:
    def test_merges_scales_and_replaces_the_one_that_was_run(self, tmp_path: Path):
        claim = make_claim("a", lambda context: held())
        record.save("toy", "cpu", [(claim, held(1.0))], where=tmp_path)
        record.save("toy", "smoke", [(claim, held(2.0))], where=tmp_path)
        record.save("toy", "smoke", [(claim, held(3.0))], failed={"b": "broke"}, where=tmp_path)
        data = strict(tmp_path / "toy.json")
        assert data == record.load("toy", tmp_path)
        assert list(data["scales"]) == ["smoke", "cpu"]
        assert data["scales"]["cpu"]["claims"][0]["value"] == 1.0
        smoke = data["scales"]["smoke"]
        assert smoke["claims"][0] == {
            "name": "a",
            "statement": "a is so",
            "threshold": "> 0",
            "expected": "",
            "verdict": "held",
            "measured": "value 3.0",
            "value": 3.0,
            "interval": [0.5, 1.5],
            "figure": None,
            "table": [],
            "cost": 0.25,
            "seeds": [],
        }
        assert smoke["failed"] == [{"name": "b", "error": "broke"}]
        assert smoke["cost"] == 0.2
        assert smoke["machine"].endswith("CPU")
        assert "torch" in smoke["versions"]

    def test_missing_record_is_none_and_damaged_ones_are_refused_untouched(self, tmp_path: Path):
        assert record.load("toy", tmp_path) is None
        for text in (
            '{"slug": "toy", ',
            "[]",
            '{"slug": "other", "scales": {}}',
            '{"slug": "toy", "scales": {"x": 1}}',
        ):
            (tmp_path / "toy.json").write_text(text)
            with pytest.raises(WeightlabError, match=r"toy\.json"):
                record.load("toy", tmp_path)
            with pytest.raises(WeightlabError, match=r"toy\.json"):
                record.save("toy", "cpu", [], where=tmp_path)
            assert (tmp_path / "toy.json").read_text() == text

    def test_a_failing_disk_leaves_the_old_file_and_no_remains(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        path = tmp_path / "toy.json"
        record.write_json(path, {"old": 1})

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(record.os, "fsync", fail)
        with pytest.raises(WeightlabError, match="No space left on device"):
            record.write_json(path, {"new": 1})
        assert strict(path) == {"old": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["toy.json"]

    def test_plain_covers_scalars_of_numpy_and_torch_and_refuses_the_rest(self):
        value = {
            "a": np.float32(0.5),
            "b": torch.tensor([1, 2]),
            "c": np.array([math.nan, 1.0]),
            "d": (1, True),
        }
        assert record.plain(value) == {"a": 0.5, "b": [1, 2], "c": [None, 1.0], "d": [1, True]}
        with pytest.raises(TypeError, match="set"):
            record.plain({"x": {1}})

    @settings(max_examples=50, deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        )
    )
    def test_written_json_reads_back_with_null_for_what_is_not_finite(self, tmp_path_factory, value: Any):
        path = tmp_path_factory.mktemp("json") / "x.json"

        def expected(item: Any) -> Any:
            if isinstance(item, float) and not math.isfinite(item):
                return None
            if isinstance(item, list):
                return [expected(part) for part in item]
            if isinstance(item, dict):
                return {key: expected(part) for key, part in item.items()}
            return item

        record.write_json(path, value)
        assert strict(path) == expected(value)

    def test_records_that_come_with_weightlab_belong_to_claims_of_the_catalogue(self):
        entries = {entry.paper.slug: entry for entry in catalogue.all_papers()}
        for path in record.folder().glob("*.json"):
            data = record.load(path.stem)
            assert data is not None
            assert path.stem in entries
            for scale, entry in data["scales"].items():
                claims = {claim.name: claim for claim in entries[path.stem].claims if scale in claim.scales}
                for result in entry["claims"]:
                    assert result["threshold"] == claims[result["name"]].threshold
                    assert result["statement"] == claims[result["name"]].statement


class TestReproduce:
    def test_runs_the_claims_of_the_scale_and_writes_the_record(self, toy, tmp_path: Path):
        contexts: list[ClaimContext] = []
        seen: list[reproduce.Progress] = []

        def run(context: ClaimContext) -> ClaimResult:
            contexts.append(context)
            context.progress(2.0, "far on")
            return replace(held(), value=math.inf, cost=0.0)

        toy(
            make_claim("a", run),
            make_claim("b", run, scales=("smoke",)),
            make_claim("c", run, scales=("cpu",)),
        )
        (outcome,) = reproduce.reproduce(["all"], "smoke", tmp_path / "out", progress=seen.append)
        assert [claim["name"] for claim in outcome["claims"]] == ["a", "b"]
        assert outcome["failed"] == []
        assert outcome["claims"][0]["value"] is None
        assert 0 < outcome["claims"][0]["cost"] < 10
        data = strict(Path(outcome["record"]))
        assert data["scales"]["smoke"]["claims"] == outcome["claims"]
        assert {context.scale for context in contexts} == {"smoke"}
        assert contexts[0].out != contexts[1].out
        assert contexts[0].out.is_dir()
        assert contexts[0].store == contexts[1].store
        assert contexts[0].store.parent.is_dir()
        far = next(signal for signal in seen if signal.message == "far on")
        assert (far.claim, far.done, far.total, far.fraction) == ("a", 0, 2, 1.0)

    def test_a_failing_claim_stops_no_other_and_only_it_is_run_again(self, toy, tmp_path: Path):
        calls: list[str] = []
        broken = True

        def fine(context: ClaimContext) -> ClaimResult:
            calls.append("fine")
            return held()

        def flaky(context: ClaimContext) -> ClaimResult:
            calls.append("flaky")
            if broken:
                raise RuntimeError("no\nluck")
            return held(2.0)

        toy(make_claim("flaky", flaky), make_claim("fine", fine))
        (outcome,) = reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert outcome["failed"] == [{"name": "flaky", "error": "RuntimeError: no luck"}]
        assert [claim["name"] for claim in strict(tmp_path / "toy.json")["scales"]["smoke"]["claims"]] == [
            "fine"
        ]
        broken = False
        (outcome,) = reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert calls == ["flaky", "fine", "flaky"]
        assert [claim["name"] for claim in outcome["claims"]] == ["flaky", "fine"]
        assert not outcome["failed"]
        assert "failed" not in strict(tmp_path / "toy.json")["scales"]["smoke"]

    def test_interrupted_it_keeps_what_is_finished_and_continues_then_measures_anew(
        self, toy, tmp_path: Path
    ):
        calls: list[str] = []
        interrupt = True

        def first(context: ClaimContext) -> ClaimResult:
            calls.append("first")
            return held()

        def second(context: ClaimContext) -> ClaimResult:
            calls.append("second")
            if interrupt:
                raise KeyboardInterrupt
            return held()

        toy(make_claim("first", first), make_claim("second", second))
        before = record.save("toy", "smoke", [(make_claim("first", first), held(9.0))], where=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert record.load("toy", tmp_path) == before
        interrupt = False
        (outcome,) = reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert calls == ["first", "second", "second"]
        assert [claim["interval"] for claim in outcome["claims"]] == [[0.5, 1.5], [0.5, 1.5]]
        reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert calls[3:] == ["first", "second"]

    def test_finished_claims_do_not_count_once_the_code_has_changed(self, toy, tmp_path: Path, monkeypatch):
        calls: list[str] = []

        def first(context: ClaimContext) -> ClaimResult:
            calls.append("first")
            return held()

        def second(context: ClaimContext) -> ClaimResult:
            raise KeyboardInterrupt

        toy(make_claim("first", first), make_claim("second", second))
        for fingerprint in ("one", "one", "two"):
            monkeypatch.setattr(reproduce, "_fingerprint", lambda slug, device, name=fingerprint: name)
            with pytest.raises(KeyboardInterrupt):
                reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert calls == ["first", "first"]

    def test_what_a_record_cannot_hold_is_a_failure_of_that_claim(self, toy, tmp_path: Path):
        toy(
            make_claim("object", lambda context: replace(held(), figure={"series": object()})),
            make_claim("nothing", lambda context: None),  # pyright: ignore[reportArgumentType]
        )
        (outcome,) = reproduce.reproduce(["toy"], "smoke", tmp_path)
        assert [failure["name"] for failure in outcome["failed"]] == ["object", "nothing"]
        assert outcome["record"] is None
        assert not (tmp_path / "toy.json").exists()

    def test_wrong_requests_run_nothing(self, toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def never(context: ClaimContext) -> ClaimResult:
            raise AssertionError("ran")

        toy(make_claim("a", never, scales=("smoke", "gpu")))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UsageError, match="no claim at scale cpu; it has claims at smoke, gpu"):
            reproduce.reproduce(["toy"], "cpu", tmp_path)
        with pytest.raises(UsageError, match="GPU"):
            reproduce.reproduce(["toy"], "gpu", tmp_path)
        with pytest.raises(UsageError, match="unknown scale 'big'"):
            reproduce.reproduce(["toy"], "big", tmp_path)  # pyright: ignore[reportArgumentType]
        (tmp_path / "toy.json").write_text("{")
        with pytest.raises(WeightlabError, match="not JSON"):
            reproduce.reproduce(["toy"], "smoke", tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(WeightlabError, match="cannot write"):
            reproduce.reproduce(["toy"], "smoke", tmp_path / "file" / "below")

    def test_unknown_papers_are_named_with_the_nearest(self):
        with pytest.raises(UsageError, match="did you mean 'auon'"):
            reproduce.reproduce(["auonn"], "smoke")

    def test_default_folder_depends_on_where_one_stands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        root = record.checkout()
        assert root is not None
        monkeypatch.chdir(root / "docs")
        assert reproduce.record_folder() == root / "docs" / "record" == record.folder()
        monkeypatch.chdir(tmp_path)
        assert reproduce.record_folder() == tmp_path / "weightlab-out" / "record"
        assert reproduce.record_folder("x") == Path("x")

    def test_command_prints_json_then_fails_when_a_claim_failed(self, toy, tmp_path: Path, capsys):
        def broken(context: ClaimContext) -> ClaimResult:
            raise UsageError("give me data")

        toy(make_claim("a", lambda context: held()), make_claim("b", broken))
        with pytest.raises(WeightlabError, match="toy b: give me data") as caught:
            reproduce.command("toy", out=tmp_path, as_json=True)
        assert caught.value.exit_code == 1
        printed = json.loads(capsys.readouterr().out)
        assert printed["slug"] == "toy"
        assert printed["claims"][0]["verdict"] == "held"

    def test_command_prints_a_table(self, toy, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("COLUMNS", "120")
        toy(make_claim("a", lambda context: replace(held(), measured="ratio [0.5] of two")))
        reproduce.command("all", out=tmp_path)
        printed = capsys.readouterr().out
        assert "held" in printed
        assert "ratio [0.5] of two" in printed
        assert "toy.json" in printed


def test_every_claim_of_the_catalogue_has_a_smoke_scale_and_a_name_of_its_own():
    for entry in catalogue.all_papers():
        names = [claim.name for claim in entry.claims]
        assert len(set(names)) == len(names)
        for claim in entry.claims:
            assert "smoke" in claim.scales
            assert set(claim.scales) <= set(SCALES)
            assert claim.statement
            assert claim.threshold
