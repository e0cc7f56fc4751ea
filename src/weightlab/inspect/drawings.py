"""Drawings of spectra and layers as small SVGs, coloured by the page's variables.

There is one for each of hundreds of layers, so they are written by hand: about 2 kB each.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightlab.inspect.binned_spectrum import BinnedSpectrum

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """A spectrum in a drawing: its bins and the class it is drawn by (`own`, `before`, `after`, `delta`)."""

    spectrum: BinnedSpectrum
    style: str


@dataclass(frozen=True)
class Tail:
    """A fitted power law."""

    alpha: float
    xmin: float
    n_tail: int
    n: int


@dataclass(frozen=True)
class Point:
    """A layer in a profile.

    Attributes:
        label: What is shown when it is pointed at.
        target: Id of the element that it leads to.
        value: Where it is.
        error: Half the length of its bar.
        colour: Number of the page's series colour.
        before: Where it was before, if it moved.
    """

    label: str
    target: str
    value: float
    error: float = 0.0
    colour: int = 1
    before: float | None = None


def power(exponent: int) -> str:
    """Write a power of ten.

    Example:
        >>> power(-3)
        '10⁻³'
    """
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def spectrum_drawing(
    curves: Sequence[Curve],
    *,
    label: str,
    tail: Tail | None = None,
    marks: Iterable[tuple[float, str]] = (),
) -> str:
    """Draw densities of eigenvalues on logarithmic axes, with the fitted law and marks at eigenvalues.

    Args:
        curves: What to draw, the last on top.
        label: Says it in words.
        tail: The law, drawn from its start to the largest eigenvalue of the last curve.
        marks: Eigenvalues and the class each is marked by (`xmin`, `erg`, `shuffled`).

    Returns:
        An `<svg>` element; empty if there is nothing to draw.
    """
    curves = [curve for curve in curves if curve.spectrum.counts]
    if not curves:
        return ""
    marks = [(place, style) for place, style in marks if place > 0 and math.isfinite(place)]
    lows = [math.log10(curve.spectrum.low) for curve in curves]
    highs = [math.log10(curve.spectrum.high) for curve in curves] + [math.log10(place) for place, _ in marks]
    densities = [math.log10(value) for curve in curves for value in curve.spectrum.density if value > 0]
    frame = _Frame(300, 190, (min(lows), max(highs)), (min(densities), max(densities)))
    parts = [frame.grid_x(_decades(*frame.x_range)), frame.grid_y(_decades(*frame.y_range))]
    parts += [frame.steps(curve) for curve in curves]
    for place, style in marks:
        x = f"{frame.x(math.log10(place)):.1f}"
        parts.append(f'<path class="{style}" d="M{x} {frame.top}V{frame.bottom}"/>')
    if tail is not None:
        start, end = math.log10(tail.xmin), math.log10(curves[-1].spectrum.high)
        height = math.log10(tail.n_tail / tail.n * (tail.alpha - 1) / tail.xmin)
        drop = height - tail.alpha * (end - start)
        floor = frame.y_range[0]
        if drop < floor < height:
            end, drop = start + (height - floor) / tail.alpha, floor
        line = f"M{frame.x(start):.1f} {frame.y(height):.1f}L{frame.x(end):.1f} {frame.y(drop):.1f}"
        parts.append(f'<path class="law" d="{line}"/>')
    return frame.svg(parts, label, "λ", "density")


def profile_drawing(
    points: Sequence[Point],
    *,
    label: str,
    unit: str,
    bands: bool = True,
    logarithmic: bool = False,
    limit: float = math.inf,
) -> str:
    """Draw a number of each layer along the depth of the model.

    Args:
        points: One a layer; those that are not finite leave a gap.
        label: Says it in words.
        unit: What the number is.
        bands: Whether to shade the ranges of α that have flags.
        logarithmic: Whether the axis is.
        limit: Points beyond are drawn at the border, as triangles.

    Returns:
        An `<svg>` element; empty if no number is finite.
    """

    def scaled(value: float) -> float:
        return math.log10(value) if logarithmic else value

    def there(value: float | None) -> bool:
        return value is not None and math.isfinite(value) and (value > 0 or not logarithmic)

    shown = [
        scaled(value)
        for point in points
        for value in (point.value, point.before)
        if value is not None and there(value)
    ]
    if not shown:
        return ""
    ends = [min(value, limit) for value in shown]
    low, high = (0.0, max(7.0, *ends)) if bands else (min(ends), max(ends))
    frame = _Frame(900, 260, (-0.5, len(points) - 0.5), (low, high), wide=True)
    parts: list[str] = []
    if bands:
        for name, bottom, top in (("over", 0.0, 2.0), ("under", 6.0, frame.y_range[1])):
            y, size = frame.y(top), frame.y(bottom) - frame.y(top)
            text = frame.bottom - 6 if name == "over" else frame.top + 13
            parts.append(f'<text x="{frame.right - 6}" y="{text}" text-anchor="end">{name}-trained</text>')
            parts.append(
                f'<rect class="{name}" x="{frame.left}" y="{y:.1f}" width="{frame.right - frame.left}" height="{size:.1f}"/>'
            )
    parts.append(frame.grid_y(_decades(*frame.y_range) if logarithmic else _rounds(*frame.y_range)))
    parts.append(frame.ticks_x(len(points)))
    for index, point in enumerate(points):
        if not there(point.value):
            continue
        x, value = frame.x(index), scaled(point.value)
        y = frame.y(min(value, limit))
        marks = []
        if point.before is not None and there(point.before):
            start = frame.y(min(scaled(point.before), limit))
            marks.append(f'<path class="move" d="M{x:.1f} {start:.1f}V{y:.1f}"/>')
            marks.append(f'<circle class="old" cx="{x:.1f}" cy="{start:.1f}" r="3.2"/>')
        elif point.error > 0 and math.isfinite(point.error) and not logarithmic:
            ends_at = [
                frame.y(max(low, min(value + sign * point.error, frame.y_range[1]))) for sign in (-1, 1)
            ]
            marks.append(f'<path class="error" d="M{x:.1f} {ends_at[0]:.1f}V{ends_at[1]:.1f}"/>')
        if value > limit:
            marks.append(f'<path class="dot" d="M{x - 4:.1f} {y + 4:.1f}h8l-4-8z"/>')
        else:
            marks.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>')
        title = f"<title>{html.escape(point.label)}</title>"
        parts.append(f'<a href="#{point.target}" class="c{point.colour}">{title}{"".join(marks)}</a>')
    return frame.svg(parts, label, "layer", unit)


class _Frame:
    """Axes: where numbers are in the drawing."""

    def __init__(
        self,
        width: int,
        height: int,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        *,
        wide: bool = False,
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right = 44, width - 8
        self.top, self.bottom = 8, height - 34
        self.x_range = x_range if wide else _padded(*x_range)
        self.y_range = _padded(*y_range)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (self.right - self.left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def grid_x(self, ticks: Sequence[tuple[float, str]]) -> str:
        lines = "".join(f"M{self.x(value):.1f} {self.top}V{self.bottom}" for value, _ in ticks)
        texts = "".join(
            f'<text x="{self.x(value):.1f}" y="{self.bottom + 13}" text-anchor="middle">{text}</text>'
            for value, text in ticks
        )
        return f'<path class="grid" d="{lines}"/>{texts}'

    def grid_y(self, ticks: Sequence[tuple[float, str]]) -> str:
        lines = "".join(f"M{self.left} {self.y(value):.1f}H{self.right}" for value, _ in ticks)
        texts = "".join(
            f'<text x="{self.left - 5}" y="{self.y(value) + 3.5:.1f}" text-anchor="end">{text}</text>'
            for value, text in ticks
        )
        return f'<path class="grid" d="{lines}"/>{texts}'

    def ticks_x(self, count: int) -> str:
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count) if count / step <= 20)
        texts = "".join(
            f'<text x="{self.x(index):.1f}" y="{self.bottom + 13}" text-anchor="middle">{index + 1}</text>'
            for index in range(step - 1 if step > 1 else 0, count, step)
        )
        return f'<path class="grid" d="M{self.left} {self.bottom}H{self.right}"/>{texts}'

    def steps(self, curve: Curve) -> str:
        """A histogram's outline; bins that hold nothing are on the floor."""
        edges = [self.x(math.log10(edge)) for edge in curve.spectrum.edges]
        floor = f"{self.bottom:.1f}"
        path = f"M{edges[0]:.1f} {floor}"
        for right, value in zip(edges[1:], curve.spectrum.density, strict=True):
            path += f"V{self.y(math.log10(value)):.1f}" if value > 0 else f"V{floor}"
            path += f"H{right:.1f}"
        return f'<path class="{curve.style}" d="{path}V{floor}"/>'

    def svg(self, parts: Iterable[str], label: str, x_name: str, y_name: str) -> str:
        middle = (self.left + self.right) / 2
        names = (
            f'<text x="{middle:.0f}" y="{self.height - 5}" text-anchor="middle">{x_name}</text>'
            f'<text transform="translate(10 {(self.top + self.bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">{y_name}</text>'
        )
        return (
            f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html.escape(label)}">'
            f"{''.join(parts)}{names}</svg>"
        )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.06 * (high - low) or 0.5
    return (low - room if low else low), high + room


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten within a range of logarithms, at most six; where there are under two, the ends' own numbers."""
    first, last = math.ceil(low), math.floor(high)
    step = max(1, math.ceil((last - first + 1) / 6))
    ticks = [(float(exponent), power(exponent)) for exponent in range(first, last + 1, step)]
    if len(ticks) >= 2:
        return ticks
    return [
        (value, f"{10**value:.2g}") for value in (low + (high - low) * share for share in (0.1, 0.5, 0.9))
    ]


def _rounds(low: float, high: float) -> list[tuple[float, str]]:
    """Up to eight round numbers within a range."""
    size = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(size * times for times in (1, 2, 5, 10) if (high - low) / (size * times) <= 8)
    first = math.ceil(low / step)
    return [(index * step, f"{index * step:g}") for index in range(first, math.floor(high / step) + 1)]
