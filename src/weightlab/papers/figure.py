"""Small line charts as SVG, drawn from a claim's figure, legible on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 680, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 36, 52
ROW = 18
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8b6fc0", "#7f7f7f")


def rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    """Round to significant digits, so that a record holds no more of a curve than its picture shows.

    Example:
        >>> rounded([1 / 3, 1234567.0])
        [0.33333, 1234600.0]
    """
    return [float(f"{value:.{digits}g}") for value in values]


def svg(figure: Mapping[str, Any]) -> str:
    """Draw a figure.

    Points that are not finite, and points ≤ 0 on a logarithmic axis, leave gaps in their line. Text
    and axes take the page's colour.

    Args:
        figure: `{"title", "x_label", "y_label", "log_x", "log_y", "series"}`, each of the series
            `{"name", "x", "y"}` and, for a band around it, `"low"` and `"high"`. All but `"series"`
            may be left out.

    Returns:
        An `<svg>` element.

    Raises:
        ValueError: When a series' lists are not equally long.

    Example:
        >>> text = svg({"title": "Time", "series": [{"name": "a", "x": [1, 2], "y": [3, 4]}]})
        >>> text.startswith("<svg") and "Time" in text
        True
    """
    series = list(figure.get("series", ()))
    for line in series:
        sizes = {key: len(line[key]) for key in ("x", "y", "low", "high") if line.get(key) is not None}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"series {line.get('name')!r} has lists of unequal length: {sizes}")
    x_axis = _Axis([line["x"] for line in series], bool(figure.get("log_x")), LEFT, WIDTH - RIGHT)
    heights = [line[key] for line in series for key in ("y", "low", "high") if line.get(key) is not None]
    y_axis = _Axis(heights, bool(figure.get("log_y")), HEIGHT - BOTTOM, TOP)
    legend, rows = _legend([str(line.get("name", "")) for line in series])
    title = str(figure.get("title", ""))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + rows * ROW}" role="img" aria-label={quoteattr(title)} '
        f'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="currentColor" '
        f'style="max-width:{WIDTH}px;width:100%;height:auto">',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
        *_grid(x_axis, y_axis),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">'
        f"{escape(str(figure.get('x_label', '')))}</text>",
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(str(figure.get('y_label', '')))}</text>",
    ]
    for index, line in enumerate(series):
        parts += _line(line, x_axis, y_axis, COLOURS[index % len(COLOURS)])
    return "\n".join([*parts, *legend, "</svg>"])


class _Axis:
    """Maps values to pixels; knows where its ticks are."""

    def __init__(self, lists: Sequence[Sequence[Any]], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        values = [
            value for numbers in lists for number in numbers if (value := self._scaled(number)) is not None
        ]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if high == low:
            low, high = low - 0.5, high + 0.5
        margin = 0.03 * (high - low)
        self.low, self.high = low - margin, high + margin

    def _scaled(self, value: Any) -> float | None:
        if value is None or not math.isfinite(value) or (self.log and value <= 0):
            return None
        return math.log10(value) if self.log else float(value)

    def pixel(self, value: Any) -> float | None:
        scaled = self._scaled(value)
        return None if scaled is None else self._place(scaled)

    def _place(self, scaled: float) -> float:
        return self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, float]]:
        """Return ticks' values and pixels."""
        return [(tick, self._place(math.log10(tick) if self.log else tick)) for tick in self._tick_values()]

    def _tick_values(self) -> list[float]:
        if self.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            stride = max(1, math.ceil(len(decades) / 8))
            leading = (1,) if self.high - self.low > 2 else (1, 2, 5)
            powers = [power + math.log10(lead) for power in decades[::stride] for lead in leading]
            ticks = [10**power for power in powers if self.low <= power <= min(self.high, 308)]
            if len(ticks) > 1:
                return ticks
            return [10**value for value in _round_values(self.low, min(self.high, 308.0))]
        return _round_values(self.low, self.high)


def _round_values(low: float, high: float, count: int = 6) -> list[float]:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick, x in x_axis.ticks():
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick, y in y_axis.ticks():
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="currentColor" stroke-opacity="0.15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="currentColor"/>')
    return parts


def _line(line: Mapping[str, Any], x_axis: _Axis, y_axis: _Axis, colour: str) -> list[str]:
    xs = [x_axis.pixel(x) for x in line["x"]]
    parts = []
    if line.get("low") is not None and line.get("high") is not None:
        edges = zip(xs, map(y_axis.pixel, line["low"]), map(y_axis.pixel, line["high"]), strict=True)
        band = [
            (x, low, high) for x, low, high in edges if x is not None and low is not None and high is not None
        ]
        outline = [f"{x:.1f} {low:.1f}" for x, low, _ in band] + [
            f"{x:.1f} {high:.1f}" for x, _, high in band[::-1]
        ]
        if outline:
            parts.append(f'<path d="M{"L".join(outline)}Z" fill="{colour}" fill-opacity="0.18"/>')
    points = list(zip(xs, map(y_axis.pixel, line["y"]), strict=True))
    path, pen_down = "", False
    for x, y in points:
        if x is None or y is None:
            pen_down = False
            continue
        path += f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}"
        pen_down = True
    parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    if len(points) <= 12:
        dots = [(x, y) for x, y in points if x is not None and y is not None]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in dots]
    return parts


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    parts: list[str] = []
    x, row = float(LEFT), 0
    for index, name in enumerate(names):
        width = 34 + 7 * len(name)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, row = float(LEFT), row + 1
        y, colour = HEIGHT + row * ROW + 4, COLOURS[index % len(COLOURS)]
        parts.append(f'<path d="M{x:.0f} {y - 4}h16" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 21:.0f}" y="{y}">{escape(name)}</text>')
        x += width
    return parts, row + 1 if names else 0
