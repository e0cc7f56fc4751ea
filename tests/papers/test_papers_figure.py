from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from weightlab.papers.figure import svg

SVG = "{http://www.w3.org/2000/svg}"


def circles(text: str) -> list[tuple[float, float]]:
    return [
        (float(dot.get("cx", "")), float(dot.get("cy", "")))
        for dot in ElementTree.fromstring(text).iter(f"{SVG}circle")
    ]


def chart(**changes: Any) -> str:
    return svg({"series": [{"name": "s", "x": [1, 2, 3], "y": [1, 2, 3]}], **changes})


def test_linear_axes_keep_proportions_and_point_upwards():
    (a, b, c) = circles(chart())
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.11)
    assert b[0] > a[0]
    assert b[1] - a[1] == pytest.approx(c[1] - b[1], abs=0.11)
    assert b[1] < a[1]


def test_equal_ratios_are_equally_far_apart_on_logarithmic_axes():
    points = {"name": "s", "x": [1, 10, 1000], "y": [2, 4, 16]}
    (a, b, c) = circles(svg({"log_x": True, "log_y": True, "series": [points]}))
    assert c[0] - b[0] == pytest.approx(2 * (b[0] - a[0]), abs=0.2)
    assert c[1] - b[1] == pytest.approx(2 * (b[1] - a[1]), abs=0.2)


def test_points_that_cannot_be_drawn_leave_a_gap():
    line = {"name": "s", "x": [1, 2, 3, 4, 5, 6], "y": [1, None, math.nan, 0, 2, 3]}
    text = svg({"log_y": True, "series": [line]})
    assert len(circles(text)) == 3
    (path,) = re.findall(r'd="([^"]*)" fill="none" stroke="#', text)
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_band_lies_between_its_edges():
    line = {"name": "s", "x": [0, 1], "y": [1, 2], "low": [0, 1], "high": [2, 3]}
    text = svg({"series": [line]})
    (band,) = re.findall(r'd="M([^"]*)Z"', text)
    corners = [tuple(map(float, point.split())) for point in band.split("L")]
    dots = circles(text)
    assert corners[0][1] > dots[0][1] > corners[3][1]
    assert corners[1][1] > dots[1][1] > corners[2][1]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "ys", [[], [5.0], [3, 3, 3], [1e-12, 2e-12], [-1, 0, 1], [None, None], [1, 1e9], [1e300, 1e308]]
)
def test_odd_data_still_make_well_formed_pictures_inside_their_frame(ys: list[float | None], log: bool):
    text = svg(
        {"title": "<&>", "log_y": log, "series": [{"name": '"a" & <b>', "x": list(range(len(ys))), "y": ys}]}
    )
    root = ElementTree.fromstring(text)
    width, height = map(float, root.get("viewBox", "").split()[2:])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in circles(text))
    assert any(node.text == "<&>" for node in root.iter(f"{SVG}text"))


def test_lists_of_unequal_length_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'s'.*'x': 2, 'y': 1"):
        svg({"series": [{"name": "s", "x": [1, 2], "y": [1]}]})
