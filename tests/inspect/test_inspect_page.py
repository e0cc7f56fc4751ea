import io
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from weightlab.inspect import Layer, compare_checkpoints, layer_report, report_html
from weightlab.inspect.binned_spectrum import BinnedSpectrum, bin_spectrum
from weightlab.inspect.drawings import Curve, Point, Tail, profile_drawing, spectrum_drawing
from weightlab.inspect.spectrum_work import layer_work
from weightlab.inspect.tables import report_table


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_bins_hold_all_eigenvalues_and_densities_add_up(values):
    spectrum = bin_spectrum(values)
    assert sum(spectrum.counts) + spectrum.below == len(values)
    edges = spectrum.edges
    assert edges == sorted(edges)
    if spectrum.counts:
        assert edges[0] == spectrum.low <= max(values) <= spectrum.high
        assert spectrum.below == sum(value < spectrum.low for value in values)
        share = sum(d * (b - a) for d, a, b in zip(spectrum.density, edges[:-1], edges[1:], strict=True))
        assert share == pytest.approx(sum(spectrum.counts) / len(values))


def test_bins_count_what_lies_in_them():
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(-0.5)
    spectrum = bin_spectrum(x)
    assert len(spectrum.counts) == 48
    counts = [
        int(((x >= a) & (x < b)).sum()) for a, b in zip(spectrum.edges[:-1], spectrum.edges[1:], strict=True)
    ]
    counts[-1] += int((x == x.max()).sum())
    assert list(spectrum.counts) == counts


def test_bins_reach_down_as_far_as_is_asked():
    x = torch.logspace(-12, 0, 200, dtype=torch.float64)
    assert bin_spectrum(x).low == pytest.approx(1e-4, rel=0.2)
    assert bin_spectrum(x, 1e-6).low == pytest.approx(1e-6, rel=0.2)
    assert bin_spectrum(x, 1e-11).low == pytest.approx(1e-8, rel=0.2)
    assert bin_spectrum(x, math.nan).low == pytest.approx(1e-4, rel=0.2)


def test_spectra_that_are_hardly_any():
    assert bin_spectrum([0.0, 0.0]) == BinnedSpectrum(0.0, 0.0, (), 2)
    assert bin_spectrum([0.0, 0.0]).edges == []
    assert bin_spectrum([]) == BinnedSpectrum(0.0, 0.0, (), 0)
    equal = bin_spectrum(torch.full((7,), 3.0))
    assert equal.counts == (7,)
    assert equal.low < 3 < equal.high


def numbers(path):
    return [float(value) for value in re.findall(r"-?\d+\.?\d*", path)]


def elements(svg, kind):
    return [found for found in ElementTree.fromstring(svg).iter() if found.get("class") == kind]


def test_the_law_is_drawn_where_the_density_is():
    """An exact power law from 1 on: the line and the outline of the histogram are one."""
    n, alpha = 20_000, 2.5
    x = (1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n).pow(-1 / (alpha - 1))
    spectrum = bin_spectrum(x)
    svg = spectrum_drawing(
        [Curve(spectrum, "own")], label="law", tail=Tail(alpha, 1.0, n, n), marks=[(1.0, "xmin")]
    )
    (law,), (outline,), (mark,) = (elements(svg, kind) for kind in ("law", "own", "xmin"))
    x0, y0, x1, y1 = numbers(law.get("d"))
    assert numbers(mark.get("d"))[0] == x0
    steps = re.findall(r"V([\d.]+)H([\d.]+)", outline.get("d"))
    left = numbers(outline.get("d"))[0]
    for height, right in steps[:20]:
        middle = (left + float(right)) / 2
        assert y0 + (y1 - y0) * (middle - x0) / (x1 - x0) == pytest.approx(float(height), abs=1.0)
        left = float(right)


def test_profiles_place_points_and_bars():
    points = [
        Point("a <1>", "layer-0", 3.0, 0.5),
        Point("b", "layer-1", math.nan),
        Point("c", "layer-2", 50.0, 1.0, colour=2),
        Point("d", "layer-3", 5.0, before=2.0),
    ]
    svg = profile_drawing(points, label="α & more", unit="α", limit=12.0)
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "α & more"
    links = [found for found in root.iter() if found.get("href")]
    assert [link.get("href") for link in links] == ["#layer-0", "#layer-2", "#layer-3"]
    assert [link.get("class") for link in links] == ["c1", "c2", "c1"]
    assert links[0][0].text == "a <1>"
    heights = {
        text.text: float(text.get("y")) - 3.5
        for text in root.iter("text")
        if text.get("text-anchor") == "end"
    }
    (error,) = elements(profile_drawing(points[:1], label="", unit=""), "error")
    dots = list(root.iter("circle"))
    assert float(dots[0].get("cy")) == pytest.approx((heights["2"] + heights["4"]) / 2, abs=0.2)
    assert [dot.get("class") for dot in dots] == ["dot", "old", "dot"]
    assert float(dots[1].get("cy")) == pytest.approx(heights["2"], abs=0.2)
    bottom, top = numbers(error.get("d"))[1:]
    assert bottom > top
    assert [found.get("class") for found in root.iter("rect")] == ["over", "under"]
    assert profile_drawing(points[1:2], label="", unit="") == ""


def test_logarithmic_profiles_leave_out_zeros():
    points = [Point("a", "layer-0", 0.01), Point("b", "layer-1", 0.0), Point("c", "layer-2", 1.0)]
    svg = profile_drawing(points, label="", unit="", bands=False, logarithmic=True)
    assert len(elements(svg, "dot")) == 2
    assert "10⁻²" in svg
    assert "10⁰" in svg


def check(page):
    """Nothing comes from outside, links lead somewhere, drawings are well formed; return the drawings."""
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    drawings = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "nan" not in drawing
    return drawings


def test_page_of_a_report():
    weights = {f"h.{i}.{part}.weight": gaussian(24, 32, seed=i) for i in range(3) for part in ("up", "down")}
    weights |= {"<b>&": gaussian(9, 9), "broken": torch.full((9, 9), math.nan), "zero": torch.zeros(12, 12)}
    report = layer_report(weights, keep_eigenvalues=True, randomize=True)
    page = report_html(report, command="weightlab inspect 'a b'")
    # A profile, and a spectrum for all but the broken and the zero.
    assert len(check(page)) == 1 + 7
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "h.#.up.weight" in page
    assert page.count("<tr>") == 1 + 9 + 1
    assert f"{report.rows[0].alpha:.9g}" in page
    assert "the weight holds NaN or infinity" in page
    assert "largest λ with shuffled entries" in page
    assert page == report_html(report, command="weightlab inspect 'a b'")
    assert "largest λ with shuffled entries" not in report_html(layer_report(weights))


def test_page_of_many_layers_is_folded_and_small():
    weights = {
        f"h.{i}.{part}": gaussian(16, 24, seed=i) for i in range(40) for part in ("up", "down", "gate")
    }
    page = report_html(layer_report(weights | {"head": gaussian(9, 9)}, keep_eigenvalues=True))
    assert len(check(page)) == 122
    assert re.findall(r"<summary>([^<]*layers\))", page) == [
        "h.#.up (40 layers)",
        "h.#.down (40 layers)",
        "h.#.gate (40 layers)",
        "others (1 layers)",
    ]
    assert len(page) < 122 * 4000


def test_page_of_a_comparison():
    before = {
        "a": gaussian(24, 32),
        "same": gaussian(20, 20),
        "tok": gaussian(30, 16),
        "gone": gaussian(9, 9),
    }
    after = {
        "a": gaussian(24, 32, seed=1),
        "same": before["same"],
        "tok": gaussian(33, 16),
        "new": gaussian(9, 9),
    }
    page = report_html(compare_checkpoints(before, after, keep_eigenvalues=True))
    # Two profiles, a spectrum of each layer in both.
    assert len(check(page)) == 2 + 3
    assert "30 → 33 rows" in page
    assert "1 only in dict, not compared" in page
    assert "unchanged" in page


def test_tables_leave_out_what_does_not_fit():
    report = layer_report({f"m.h.{i}.w.weight": gaussian(24, 32, seed=i) for i in range(2)}, randomize=True)

    def text(width):
        console = Console(width=width or 300, file=io.StringIO())
        console.print(report_table(report, width))
        return console.file.getvalue()  # type: ignore[attr-defined]

    wide, narrow = text(None), text(50)
    assert "m.h.*" in wide
    assert "orth." in wide
    assert "soft rank" in wide
    assert "orth." not in narrow
    for shown in (wide, narrow):
        for row in report.rows:
            assert re.search(rf"^{row.name[4]}\.w .*{re.escape(f'{row.alpha:.3g}')}", shown, re.MULTILINE)
    assert max(map(len, narrow.splitlines())) <= 50


def test_brackets_in_names_are_shown():
    report = layer_report({"qkv": gaussian(12, 36), "[bold]": gaussian(9, 9)}, split_qkv=True)
    console = Console(width=100, file=io.StringIO())
    console.print(report_table(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "qkv[q]" in shown
    assert "[bold]" in shown


def test_work_is_that_of_the_matrices():
    def layer(kind, *shape):
        return Layer("w", kind, shape, torch.float32, lambda: torch.empty(0))

    assert layer_work(layer("matrix", 3000, 6000)) == pytest.approx(90e9, rel=0.01)
    assert layer_work(layer("matrix", 6000, 3000)) == layer_work(layer("matrix", 3000, 6000))
    conv = layer("conv", 512, 256, 3, 3)
    assert layer_work(conv) == pytest.approx(9 * layer_work(layer("matrix", 512, 256)), rel=0.5)
    assert layer_work(conv, "flattened") == layer_work(layer("matrix", 512, 256 * 9))
