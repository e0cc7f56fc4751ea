from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import compare, make_arm, make_profile, make_report
from rich.console import Console

from weightlab._pages import files
from weightlab.exceptions import MissingDependencyError, WeightlabError
from weightlab.trial.report import export, html, plots, terminal, wording
from weightlab.trial.result import TrialReport

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


def with_versus(report: TrialReport, index: int = 1, **changes) -> TrialReport:
    arms = list(report.arms)
    assert arms[index].versus is not None
    arms[index] = replace(arms[index], versus=replace(arms[index].versus, **changes))
    return replace(report, arms=arms)


def scaled(report: TrialReport, factor: float) -> TrialReport:
    """The same trial with every score and difference times `factor`."""
    arms = []
    for arm in report.arms:
        versus = arm.versus and replace(
            arm.versus,
            differences=[factor * d for d in arm.versus.differences],
            difference=factor * arm.versus.difference,
            interval=tuple(factor * bound for bound in arm.versus.interval),
            adjusted_interval=tuple(factor * bound for bound in arm.versus.adjusted_interval),
        )
        runs = [replace(run, score=factor * run.score) for run in arm.runs]
        arms.append(replace(arm, mean=factor * arm.mean, std=factor * arm.std, runs=runs, versus=versus))
    return replace(report, arms=arms)


def untimed(report: TrialReport) -> TrialReport:
    arms = []
    for arm in report.arms:
        runs = [
            replace(run, train_seconds=None, curve=[replace(point, seconds=0.0) for point in run.curve])
            for run in arm.runs
        ]
        versus = arm.versus and replace(arm.versus, time_matched=None, time_to_target={}, speedup=None)
        arms.append(
            replace(
                arm,
                runs=runs,
                versus=versus,
                step_ms=None,
                train_seconds=None,
                peak_memory_mb=None,
                state_mb=None,
            )
        )
    return replace(report, arms=arms, target=None)


def higher_is_better() -> TrialReport:
    report = make_report()
    base = [run.score for run in report.arms[0].runs]
    arms = [
        arm
        if arm.versus is None
        else replace(arm, versus=compare([run.score for run in arm.runs], base, mode="max"))
        for arm in report.arms
    ]
    return replace(report, mode="max", metric="accuracy", arms=arms)


EIGHT = ("adamw", EVIL, "$\\frac{1}$", "日本", "a" * 60, "q\"uo'te&", "[bold]x[/bold]", "h")
SMALL = make_report(names=("adamw", "muon"), tune=2)
CASES = {
    "plain": make_report(),
    "no challengers": make_report(names=("adamw",)),
    "one seed": make_report(seeds=(100,), tune=2),
    "failures": make_report(broken=(101, 103), tune=3),
    "every seed failed": make_report(broken=(100, 101, 102, 103, 104), tune=0),
    "no tuning": make_report(tune=0),
    "one tuning point": make_report(tune=1),
    "no timings": untimed(SMALL),
    "huge": scaled(SMALL, 1e12),
    "tiny": scaled(SMALL, 1e-12),
    "eight arms": make_report(names=EIGHT, seeds=tuple(range(100, 110)), broken=(101,)),
    "max": higher_is_better(),
    "no minimal effect": replace(SMALL, minimal_effect=0.0),
    "infinite score": with_versus(SMALL, differences=[math.inf, 0.1, 0.2, 0.1, 0.0], difference=math.inf),
    "identical arms": with_versus(
        SMALL,
        differences=[0.0] * 5,
        difference=0.0,
        interval=(0.0, 0.0),
        adjusted_interval=(0.0, 0.0),
        effect_size=None,
        win_rate=0.5,
        verdict="not held",
    ),
}
PAGES: dict[str, str] = {}
each_page = pytest.mark.parametrize("case", CASES)
each_case = pytest.mark.parametrize("report", CASES.values(), ids=CASES.keys())


def page_of(case: str) -> str:
    """The page of a case, drawn once."""
    if case not in PAGES:
        PAGES[case] = html.page(CASES[case])
    return PAGES[case]


def printed(report: TrialReport, width: int, **options) -> str:
    console = Console(width=width, file=io.StringIO(), **options)
    terminal.render(report, console, html="out/report.html")
    return console.file.getvalue()


class Page(HTMLParser):
    """Checks nesting while it collects tags, ids, references, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
                self.references.append(value or "")
            if name.startswith("on"):
                raise AssertionError(f"event handler {name} on {tag}")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.words.append(data)


def svgs(text: str) -> list[str]:
    return re.findall(r"<svg role=.*?</svg>", text, flags=re.DOTALL)


class TestWording:
    @settings(deadline=None, max_examples=60)
    @given(
        value=st.floats(-1e5, 1e5),
        half=st.floats(1e-5, 1e4),
    )
    def test_difference_and_interval_share_decimals_that_resolve_the_interval(self, value, half):
        form = wording.rounding([half], [value])
        texts = [form(value, signed=True), *form.range((value - half, value + half))[1:-1].split(", ")]
        decimals = {len(text.partition(".")[2]) for text in texts}
        assert len(decimals) == 1
        # Two significant digits of the half-width, unless it would take more than six decimals.
        assert float(texts[0]) == pytest.approx(value, abs=max(half / 19.9, 5.1e-7))

    def test_a_number_that_rounds_to_zero_has_no_sign(self):
        assert wording.Rounding(3)(-0.0001, signed=True) == "0.000"

    @pytest.mark.parametrize(
        ("mode", "difference", "interval", "verdict", "words"),
        [
            ("min", -0.05, (-0.07, -0.03), "held", "-0.050 [-0.070, -0.030] in loss, better; the whole "
             "interval clears the claimed gain of 0.01."),
            ("min", 0.031, (0.012, 0.05), "not held", "+0.031 [+0.012, +0.050] in loss, worse; the claim "
             "needed at least 0.01 better."),
            ("min", -0.004, (-0.008, 0.0), "not held", "-0.0040 [-0.0080, 0.0000] in loss, better; the whole "
             "interval falls short of the claimed gain of 0.01."),
            ("max", 0.05, (0.03, 0.07), "held", "+0.050 [+0.030, +0.070] in loss, better; the whole interval "
             "clears the claimed gain of 0.01."),
            ("max", -0.03, (-0.05, -0.01), "not held", "-0.030 [-0.050, -0.010] in loss, worse; the claim "
             "needed at least 0.01 better."),
            ("min", -0.02, (-0.06, 0.02), "inconclusive", "-0.020 [-0.060, +0.020] in loss, better; the "
             "interval reaches both sides of the claimed gain of 0.01; about 14 seeds would settle it (now 5)."),
        ],
    )  # fmt: skip
    def test_sentence(self, mode, difference, interval, verdict, words):
        report = with_versus(
            replace(make_report(names=("adamw", "muon")), mode=mode),
            difference=difference,
            interval=interval,
            adjusted_interval=interval,
            verdict=verdict,
            seeds_needed=14 if verdict == "inconclusive" else None,
        )
        assert wording.sentence(report, report.arms[1]) == f"muon vs adamw: {verdict}: {words}"

    def test_sentence_names_the_interval_that_decides(self):
        report = make_report()
        assert "corrected for 2 challengers: [-0.112, -0.055]" in wording.sentence(report, report.arms[1])

    def test_sentence_without_interval(self):
        report = make_report(seeds=(100,))
        words = wording.sentence(report, report.arms[1])
        assert "1 seed gives no interval, run at least 5" in words
        assert "inf" not in words

    @pytest.mark.parametrize(
        ("verdicts", "words"),
        [
            (("held", "not held"), "muon beats adamw: 0.084 lower loss (4.9%)"),
            (("held", "held"), "muon and auon beat adamw; muon by the most: 0.084 lower loss (4.9%)"),
            (("not held", "not held"), "No challenger beats adamw by 0.01 or more"),
            (("inconclusive", "not held"), "No challenger is shown to beat adamw by 0.01 or more; muon may"),
        ],
    )
    def test_headline(self, verdicts, words):
        report = make_report()
        for index, verdict in enumerate(verdicts, start=1):
            report = with_versus(report, index, verdict=verdict)
        assert wording.headline(report) == words

    def test_headline_without_challengers(self):
        assert wording.headline(make_report(names=("adamw",))).startswith("adamw reaches loss 1.716")

    def test_failures_edges_and_broken_pairing_are_told_once(self):
        report = replace(make_report(broken=(101,)), paired=False)
        lines = wording.warnings(report)
        assert sum("auon: 1 of 5 report runs failed" in line for line in lines) == 1
        assert sum("lr at its upper edge" in line for line in lines) == 1
        assert sum("pairing is broken" in line for line in lines) == 1
        assert wording.warnings(replace(report, notes=lines)) == lines


class TestTerminal:
    @each_case
    @pytest.mark.parametrize("width", [60, 80, 120, 200])
    def test_fits_the_width_and_keeps_what_matters(self, report, width):
        text = printed(report, width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "out/report.html" in text
        flat = " ".join(text.split())
        for _, versus in wording.challengers(report):
            assert versus.verdict in flat
        if report is CASES["plain"]:
            for part in ("1.633 ± 0.017", "-0.084 [-0.107, -0.060]", "held", "muon beats adamw"):
                assert part in flat

    @pytest.mark.parametrize("width", [80, 120])
    def test_every_cost_is_shown_at_usual_widths(self, width):
        text = printed(make_report(), width)
        for part in ("5 of 5", "59.0 ms (1.40x)", "-0.064", "5.20 s (1.52x faster)", "621 MiB", "3.20 MiB"):
            assert part in text

    def test_colour_only_on_terminals(self):
        assert "\x1b[" not in printed(make_report(), 100)
        assert "\x1b[1;32mheld" in printed(make_report(), 100, force_terminal=True, color_system="standard")

    def test_names_are_neither_markup_nor_control_sequences(self):
        text = printed(make_report(names=("adamw", "[red]x[/red]", "y\x1b[2J")), 120)
        assert "[red]x[/red]" in text
        assert "\x1b" not in text

    def test_ascii_console(self):
        console = Console(width=80, file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        terminal.render(make_report(), console)
        console.file.flush()
        assert b"1.716 +/- 0.028" in console.file.buffer.getvalue()

    @pytest.mark.parametrize("width", [60, 120])
    def test_profile(self, width):
        console = Console(width=width, file=io.StringIO())
        terminal.render_profile(make_profile(), console)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert text.index("muon ") < text.index("adamw ")
        assert "not reached" in text or width == 60


class TestHtml:
    @each_page
    def test_page_is_whole_safe_and_self_contained(self, case):
        text, report = page_of(case), CASES[case]
        page = Page(text)
        assert page.tags["script"] == 1
        assert len(page.ids) == len(set(page.ids))
        for reference in page.references:
            assert reference.startswith("#")
        assert not re.search(r"url\((?!#)", text)
        assert "@import" not in text
        assert len(text.encode()) < 1_000_000
        words = " ".join(page.words)
        for arm in report.arms:
            assert wording.plain(arm.name) in words
        assert report.command in words

    @each_page
    def test_figures_are_sound_svg_in_the_colours_of_the_page(self, case):
        figures = svgs(page_of(case))
        assert figures
        for figure in figures:
            root = ElementTree.fromstring(figure)
            assert root.get("aria-label")
            assert root.get("width") is None
            coordinates = re.findall(r' (?:d|x|y|transform)="([^"]*)"', figure)
            assert not any(re.search(r"nan|inf", value) for value in coordinates)
            colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", figure))
            assert not colours

    def test_references_within_figures_resolve_within_the_same_figure(self):
        for figure in svgs(page_of("eight arms")):
            ids = set(re.findall(r'id="([^"]+)"', figure))
            used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', figure))
            assert used
            assert used <= ids

    def test_names_are_escaped_everywhere(self):
        report = make_report(names=("adamw", EVIL), task=EVIL, tune=2)
        report = replace(
            report,
            task_description=EVIL,
            metric=EVIL,
            notes=[EVIL],
            command=f"weightlab trial --task '{EVIL}'",
            versions={EVIL: EVIL},
            arms=[replace(arm, description=EVIL, hyperparameters={EVIL: EVIL}) for arm in report.arms],
        )
        text = html.page([report], make_profile())
        assert EVIL not in text
        assert Page(text).tags["script"] == 1

    def test_only_our_script_may_run(self):
        text = page_of("plain")
        script = re.search(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        assert script is not None
        digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
        assert (
            f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
            in text
        )

    def test_several_tasks_with_a_profile_and_equal_bytes_each_time(self):
        reports = [SMALL, replace(SMALL, task="digits-mlp")]
        text = html.page(reports, make_profile())
        page = Page(text)
        assert len(page.ids) == len(set(page.ids))
        assert "Across tasks" in page.words
        assert "0.978" in page.words
        again = [make_report(names=("adamw", "muon"), tune=2, task=r.task) for r in reports]
        again[1] = replace(again[1], command=SMALL.command)
        assert html.page(again, make_profile()) == text

    def test_settings_of_matplotlib_are_left_alone(self):
        import matplotlib as mpl

        before = dict(mpl.rcParams)
        plots.differences(SMALL, "salt")
        assert dict(mpl.rcParams) == before

    @pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
    def test_missing_package_is_named_and_nothing_is_written(self, package, monkeypatch, tmp_path):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=rf"{package}.*weightlab\[trial\]"):
            html.write(make_report(), tmp_path / "report.html")
        assert list(tmp_path.iterdir()) == []


class TestPlots:
    def test_difference_dots_lie_where_the_numbers_say(self):
        report = make_report(names=("adamw", "muon"))
        versus = report.arms[1].versus
        assert versus is not None
        figure = plots.differences(report, "salt")
        assert figure is not None
        dots = re.findall(r'<use [^>]*x="([\d.]+)" y="[\d.]+" style="fill: var\(--arm-1\)', figure)
        xs = [float(x) for x in dots]
        values = list(versus.differences)
        assert len(xs) == len(values)
        slope = (xs[1] - xs[0]) / (values[1] - values[0])
        assert slope > 0
        for x, value in zip(xs, values, strict=True):
            assert x == pytest.approx(xs[0] + slope * (value - values[0]), abs=1e-3)

    def test_mean_curve_is_the_mean_with_the_range_over_runs_that_ended_well(self):
        arm = make_arm("auon", floor=1.7, rate=6.0, step_ms=10.0, state_mb=1.0, broken=(101,))
        good = [run for run in arm.runs if run.seed != 101]
        rows = plots._mean_curve(arm.runs)
        assert [row[0] for row in rows] == list(range(0, 201, 10))
        for row in rows:
            values = [point.metric for run in good for point in run.curve if point.step == row[0]]
            assert row[2:] == pytest.approx((sum(values) / 4, min(values), max(values)))

    def test_a_long_curve_is_thinned_and_keeps_its_ends(self):
        run = make_report().arms[0].runs[0]
        long = replace(run, curve=[replace(run.curve[0], step=step, metric=1.0) for step in range(5001)])
        rows = plots._mean_curve([long])
        assert len(rows) <= 202
        assert (rows[0][0], rows[-1][0]) == (0, 5000)

    def test_the_baseline_alone_has_its_colour_and_no_challengers_look_the_same(self):
        looks = [(plots.colour(index), plots.dash(index)) for index in range(8)]
        assert len(set(looks)) == 8
        assert all(plots.colour(index) for index in range(1, 40))

    def test_only_hyperparameters_that_were_tuned_are_drawn(self):
        arm = make_report().arms[0]
        assert plots.tuned_names(arm) == ["lr", "weight_decay", "momentum"]

    def test_tuning_axis_holds_three_quarters_of_the_scores_and_the_best(self):
        report = make_report()
        limits = plots.tuning_limits(report)
        assert limits is not None
        scores = sorted(p.score for arm in report.arms for p in arm.tuning if p.status == "ok")
        inside = [score for score in scores if limits[0] <= score <= limits[1]]
        assert scores[0] in inside
        assert len(inside) >= 0.75 * len(scores)


class TestExport:
    @each_case
    def test_json_is_strict_and_says_what_the_report_says(self, report):
        def refuse(constant):
            raise AssertionError(constant)

        data = json.loads(export.to_json(report), parse_constant=refuse)
        assert [arm["name"] for arm in data["arms"]] == [arm.name for arm in report.arms]
        for arm, written in zip(report.arms, data["arms"], strict=True):
            assert written["metric"]["mean"] == arm.mean
            assert written["metric"]["per_seed"] == [run.score for run in arm.runs]
            if arm.versus is not None:
                bounds = [b if math.isfinite(b) else None for b in arm.versus.interval]
                assert written["versus"]["interval"] == bounds

    @each_case
    def test_csv_has_one_row_a_run(self, report):
        rows = list(csv.DictReader(io.StringIO(export.to_csv(report))))
        for arm in report.arms:
            own = [row for row in rows if row["arm"] == arm.name]
            tuned = [row for row in own if row["role"] == "tune"]
            runs = [row for row in own if row["role"] == "report"]
            assert [float(row["score"]) for row in tuned] == [point.score for point in arm.tuning]
            assert [float(row["score"]) for row in runs] == [run.score for run in arm.runs]
            assert [int(row["seed"]) for row in runs] == [run.seed for run in arm.runs]
            assert [row["status"] for row in runs] == [run.status for run in arm.runs]
            assert all(float(row["hp_lr"]) == arm.hyperparameters["lr"] for row in runs)

    def test_tuning_over_several_seeds_names_none(self):
        report = make_report()
        report = replace(report, budget=replace(report.budget, tune_seeds=(0, 1)))
        rows = csv.DictReader(io.StringIO(export.to_csv(report)))
        assert {row["seed"] for row in rows if row["role"] == "tune"} == {""}

    def test_files(self, tmp_path):
        report = make_report()
        path = export.write_json(report, tmp_path / "new" / "trial.json")
        assert path.read_text("utf-8") == export.to_json(report) + "\n"
        path = export.write_csv(report, tmp_path / "new" / "trial.csv")
        assert path.read_bytes().decode("utf-8") == export.to_csv(report)


class TestFiles:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = files.write_text(tmp_path / "page.html", "old")

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.os, "replace", full)
        with pytest.raises(WeightlabError, match=r"cannot write .*page\.html: No space left on device"):
            files.write_text(path, "new")
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
        assert path.read_text() == "old"

    def test_a_folder_in_the_way(self, tmp_path):
        (tmp_path / "page.html").mkdir()
        with pytest.raises(WeightlabError, match="cannot write"):
            files.write_text(tmp_path / "page.html", "new")
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]

    def test_a_file_where_a_folder_is_needed(self, tmp_path):
        (tmp_path / "out").write_text("x")
        with pytest.raises(WeightlabError, match="cannot write"):
            files.write_text(tmp_path / "out" / "page.html", "new")


def test_import_brings_nothing_heavy():
    code = (
        "import sys, weightlab.trial.report as r; r.LiveDisplay, r.terminal, r.html, r.export, r.plots;"
        "print([m for m in ('torch', 'matplotlib', 'jinja2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
