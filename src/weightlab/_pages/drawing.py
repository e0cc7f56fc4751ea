"""Figures as SVG text, drawn by matplotlib and coloured by the page's CSS variables.

Colours are placeholders while matplotlib draws and become `var(--arm-0)`, `currentColor`, ... at the
end, so that one drawing is legible on light and dark pages alike. No global state of matplotlib is
used or left behind, and equal input gives equal bytes.
"""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weightlab._lazy import require

TEXT, MUTED, GRID, GOOD, BAD, PAGE = "#111213", "#717273", "#d1d2d3", "#0a9b0c", "#b1b2b3", "#fafbfc"
SERIES = tuple(f"#a0{index:02x}f{index:x}" for index in range(8))
"""Colours of lines, told apart on light and dark pages and by the colour-blind."""

_VARIABLES = {
    TEXT: "currentColor",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    GOOD: "var(--held)",
    BAD: "var(--not-held)",
    PAGE: "var(--card)",
    **{colour: f"var(--arm-{index})" for index, colour in enumerate(SERIES)},
}
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "path.simplify": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "lines.linewidth": 1.6,
    "lines.scale_dashes": False,
}


@contextmanager
def canvas(width: float, height: float) -> Iterator[Any]:
    """Yield a figure of a size in inches, with our style in force until the block ends."""
    matplotlib = require("matplotlib", "trial")
    figures = require("matplotlib.figure", "trial")
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # Names in scripts that matplotlib's own font lacks are drawn by the browser's fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield figures.Figure(figsize=(width, height), layout="constrained", facecolor="none")


def svg(figure: Any, salt: str, label: str) -> str:
    """Return the figure as an `<svg>` element without fixed size, dates or colliding ids."""
    import io

    matplotlib = require("matplotlib", "trial")
    backend = require("matplotlib.backends.backend_svg", "trial")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        backend.FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r'style="[^"]*"', lambda found: _restyle(found.group()), text)
    text = re.sub(r'^(<svg [^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg [^>]*?) height="[^"]*"', r"\1", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _restyle(style: str) -> str:
    style = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLES.get(found.group(), found.group()), style)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", style)


def style_axes(axes: Any, *, grid: str = "both") -> Any:
    """Give axes our thin lines, and a grid along `grid`: "x", "y" or "both"."""
    axes.set_facecolor("none")
    axes.tick_params(length=2.5, width=0.6)
    axes.grid(visible=False)
    axes.grid(visible=True, axis=grid)
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    return axes
